// Constants of the counter-based normals, shared by the CPU and CUDA kernels. Meaning and source: genfast/random.py.
#pragma once
#include <cstdint>

namespace genfast {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

// ln(1 + f) = f - f^2/2 + f^3 P(f) on [sqrt(1/2) - 1, sqrt(2) - 1].
constexpr float kLogP[8] = {0.3333333134651184f,  -0.250008225440979f, 0.20001226663589478f, -0.16623356938362122f,
                            0.14201761782169342f, -0.131601944565773f, 0.12761549651622772f, -0.07634429633617401f};
constexpr float kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;
constexpr int32_t kSqrtHalfBits = 0x3F3504F3;

// sin(2 pi y) = y (hi + (lo + y^2 P(y^2))), cos(2 pi y) = 1 + y^2 P(y^2), |y| <= 1/8.
constexpr float kSinHi = 6.2831854820251465f, kSinLo = -1.9519180227689503e-07f;
constexpr float kSinP[3] = {-41.3416633605957f, 81.59235382080078f, -75.39356231689453f};
constexpr float kCosP[4] = {-19.739208221435547f, 64.93932342529297f, -85.44374084472656f, 59.2459602355957f};

constexpr float kTwoToMinus32 = 2.3283064365386963e-10f;

}  // namespace genfast
