// Counter-based random numbers: Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random
// numbers: as easy as 1, 2, 3", SC'11. The same words as Random123, cuRAND and tl.philox.
//
// Element j of sample `index` reads word j % 4 of the block
//
//   key     = (seed low, seed high)                            32-bit words
//   counter = (j / 4, stream, index low, index high)
//
// so a number depends on nothing but (seed, stream, index, j). What the words become:
//
//   uniform   w -> (w >> 8) * 2^-24                            [0, 1), 24 bits
//   normal    (w0, w1) -> (r cos a, r sin a), Box-Muller       elements 2i and 2i + 1
//             r = sqrt(-2 ln(w0 * 2^-32 + 2^-33)), a = 2 pi (w1 >> 8) * 2^-24
//   integer   (w0, w1) -> high 64 bits of (w0 + 2^32 w1) * high    bias below high / 2^64
//
// r, cos a and sin a are evaluated in double and rounded to float, which hides the last-bit
// differences between math libraries; everything else is float.
#pragma once

#include <array>
#include <cstdint>

namespace philox {

using Block = std::array<std::uint32_t, 4>;
using Key = std::array<std::uint32_t, 2>;

// The bijection: ten rounds of `counter` under `key`.
Block block(Block counter, Key key);

// Which numbers to make. `indices` holds `samples` values and is owned by the caller.
struct Request {
  std::uint64_t seed;
  std::uint32_t stream;
  const std::int64_t* indices;
  std::int64_t samples;
};

// Each fills out[samples][elements], row-major and owned by the caller; elements <= 2^34.
void words(std::uint32_t* out, std::int64_t elements, const Request& request);
void uniform(float* out, std::int64_t elements, const Request& request);
void normal(float* out, std::int64_t elements, const Request& request);

// Fills out[samples] with integers in [0, high).
void integers(std::int64_t* out, std::uint64_t high, const Request& request);

}  // namespace philox
