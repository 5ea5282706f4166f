// Constants of the weights of a draw. Meaning: genfast/reference/token_sampling.py.
#pragma once
#include <cstdint>

namespace genfast {

constexpr float kExp2P[7] = {1.0f,
                             0.6931471824645996f,
                             0.24022647738456726f,
                             0.05550359934568405f,
                             0.009618505835533142f,
                             0.0013390807434916496f,
                             0.00015326470020227134f};
constexpr float kExp2Lowest = -80.0f;
constexpr float kRoundToInteger = 12582912.0f;  // 1.5 2^23: adding it rounds to a whole number, to even

// K: the weight of the largest of `size` entries is 2^K.
constexpr int weight_bits(int64_t size) {
  int bits = 0;
  while (bits < 62 && ((int64_t)1 << bits) < size) bits++;
  return 62 - bits < 60 ? 62 - bits : 60;
}

}  // namespace genfast
