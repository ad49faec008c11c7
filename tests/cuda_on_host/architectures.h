#pragma once

#define NTM_ARCHITECTURES "cuda_on_host"  // the backend's name
#define NTM_CUBINS 1
