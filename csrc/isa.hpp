// One piece of arithmetic compiled for several instruction sets, of which one is chosen at run
// time: the x86-64 levels v4 (AVX-512) and v3 (AVX2 and FMA), and whatever the compiler builds for
// by default.
#pragma once

#include <string>
#include <vector>

// What a lambda or function needs so that its loops are compiled for the level they are run at:
// everything in them has to be inlined.
#define INLINED __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define X86_64_LEVELS 1
#else
#define X86_64_LEVELS 0
#endif

namespace isa {

enum class Level { baseline, v3, v4 };

// Names of the levels that this CPU has, highest first.
std::vector<std::string> available();

// The level to run at from now on, one of `available()`; at first it is the highest. Other names
// throw std::invalid_argument. Tests compare levels; nothing else needs this.
void use(const std::string& name);

// The level in use.
Level current();

#if X86_64_LEVELS
template <typename Work>
__attribute__((target("arch=x86-64-v4"))) void run_v4(const Work& work) {
  work();
}

template <typename Work>
__attribute__((target("arch=x86-64-v3"))) void run_v3(const Work& work) {
  work();
}
#endif

// Calls work(), an INLINED lambda, as compiled for the level in use.
template <typename Work>
void run(const Work& work) {
#if X86_64_LEVELS
  switch (current()) {
    case Level::v4:
      return run_v4(work);
    case Level::v3:
      return run_v3(work);
    case Level::baseline:
      break;
  }
#endif
  work();
}

}  // namespace isa
