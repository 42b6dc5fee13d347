// Stands in for CUDA's header of this name when device code is compiled for the host.
#pragma once

#include "../cuda_emulation.h"
