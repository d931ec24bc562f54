// With this folder first in the include path, `#include <cuda_runtime.h>` finds the emulation.
#pragma once

#include "cuda_emulation.h"
