#include "philox.hpp"

#include <algorithm>
#include <cmath>

namespace philox {
namespace {

constexpr std::uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr std::uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
constexpr int kRounds = 10;
constexpr double kTwoPi = 6.283185307179586476925;

float to_uniform(std::uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24f; }

// Writes `convert(block)` for every block of every sample, cutting off the last block of a sample.
template <typename T, typename Convert>
void fill(T* out, std::int64_t elements, const Request& request, Convert convert) {
  const Key key{static_cast<std::uint32_t>(request.seed),
                static_cast<std::uint32_t>(request.seed >> 32)};
  for (std::int64_t s = 0; s < request.samples; ++s) {
    const auto index = static_cast<std::uint64_t>(request.indices[s]);
    Block counter{0, request.stream, static_cast<std::uint32_t>(index),
                  static_cast<std::uint32_t>(index >> 32)};
    T* row = out + s * elements;
    for (std::int64_t j = 0; j < elements; j += 4, ++counter[0]) {
      const std::array<T, 4> values = convert(block(counter, key));
      std::copy_n(values.begin(), std::min<std::int64_t>(4, elements - j), row + j);
    }
  }
}

}  // namespace

Block block(Block c, Key k) {
  for (int round = 0; round < kRounds; ++round) {
    const std::uint64_t p0 = static_cast<std::uint64_t>(kMultiplier0) * c[0];
    const std::uint64_t p1 = static_cast<std::uint64_t>(kMultiplier1) * c[2];
    c = {static_cast<std::uint32_t>(p1 >> 32) ^ c[1] ^ k[0], static_cast<std::uint32_t>(p1),
         static_cast<std::uint32_t>(p0 >> 32) ^ c[3] ^ k[1], static_cast<std::uint32_t>(p0)};
    k = {k[0] + kWeyl0, k[1] + kWeyl1};
  }
  return c;
}

void words(std::uint32_t* out, std::int64_t elements, const Request& request) {
  fill(out, elements, request, [](const Block& w) { return w; });
}

void uniform(float* out, std::int64_t elements, const Request& request) {
  fill(out, elements, request, [](const Block& w) {
    return std::array<float, 4>{to_uniform(w[0]), to_uniform(w[1]), to_uniform(w[2]),
                                to_uniform(w[3])};
  });
}

void normal(float* out, std::int64_t elements, const Request& request) {
  fill(out, elements, request, [](const Block& w) {
    std::array<float, 4> z;
    for (int pair = 0; pair < 4; pair += 2) {
      const double u = static_cast<float>(w[pair]) * 0x1p-32f + 0x1p-33f;  // (0, 1]
      const double angle = kTwoPi * to_uniform(w[pair + 1]);
      const auto radius = static_cast<float>(std::sqrt(-2.0 * std::log(u)));
      z[pair] = radius * static_cast<float>(std::cos(angle));
      z[pair + 1] = radius * static_cast<float>(std::sin(angle));
    }
    return z;
  });
}

void integers(std::int64_t* out, std::uint64_t high, const Request& request) {
  fill(out, 1, request, [high](const Block& w) {
    const std::uint64_t x = w[0] | static_cast<std::uint64_t>(w[1]) << 32;
    const auto scaled = static_cast<unsigned __int128>(x) * high >> 64;
    return std::array<std::int64_t, 4>{static_cast<std::int64_t>(scaled)};
  });
}

}  // namespace philox
