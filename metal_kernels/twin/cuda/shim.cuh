// The Metal Shading Language and its standard library for NVIDIA GPUs of compute capability 8.0 and newer.
// Knows no kernel. Compiled by NVRTC with --device-as-default-execution-space; needs no headers of the CUDA toolkit.
// Not done: textures, function pointers, swizzles.
#pragma once
#include "matrix.cuh"
namespace metal = msl;
