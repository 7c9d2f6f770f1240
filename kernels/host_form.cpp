// All kernels as one host library, for tests/kernels.rs.
#define MODULE_ALL
#include "adasum.cu"
#include "copy.cu"
#include "map.cu"
#include "reduce.cu"
