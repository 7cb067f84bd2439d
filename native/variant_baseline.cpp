#define MASKSERVE_ISA baseline
#define MASKSERVE_ISA_NAME "baseline"
#include "kernels.hpp"
