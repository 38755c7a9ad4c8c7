#include "isa.hpp"

#include <atomic>
#include <stdexcept>

namespace isa {
namespace {

const char* const kNames[] = {"baseline", "x86-64-v3", "x86-64-v4"};  // as Level counts

Level highest() {
#if X86_64_LEVELS
  if (__builtin_cpu_supports("x86-64-v4")) return Level::v4;
  if (__builtin_cpu_supports("x86-64-v3")) return Level::v3;
#endif
  return Level::baseline;
}

std::atomic<Level>& in_use() {
  static std::atomic<Level> level{highest()};
  return level;
}

}  // namespace

std::vector<std::string> available() {
  std::vector<std::string> names;
  for (int level = static_cast<int>(highest()); level >= 0; --level) names.push_back(kNames[level]);
  return names;
}

void use(const std::string& name) {
  for (int level = static_cast<int>(highest()); level >= 0; --level) {
    if (name == kNames[level]) return in_use().store(static_cast<Level>(level));
  }
  throw std::invalid_argument("this CPU has no instruction set " + name);
}

Level current() { return in_use().load(std::memory_order_relaxed); }

}  // namespace isa
