// Compiled once per operator and instruction set: FGVC_KERNEL_HEADER is the operator's kernels, FGVC_ISA their
// namespace.
#include FGVC_KERNEL_HEADER
