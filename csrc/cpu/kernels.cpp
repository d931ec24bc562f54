// Compiled once per instruction set, with FGVC_ISA its name: every operator's kernels, and the table that lists them.
#include "kernels.h"

#include "diversify.h"
#include "global_k_max_pool.h"
#include "gradient_boosting_cross_entropy.h"

#define FGVC_STRING_(x) #x
#define FGVC_STRING(x) FGVC_STRING_(x)

namespace fgvc_ext::FGVC_ISA {

extern const Kernels table;
const Kernels table = {
    FGVC_STRING(FGVC_ISA),
    diversify,
    spread_bits,
    gradient_boosting_cross_entropy,
    gradient_boosting_cross_entropy_backward,
    global_k_max_pool,
    global_k_max_pool_backward,
    global_k_max_pool_weight_grad,
};

}  // namespace fgvc_ext::FGVC_ISA
