#include "planner.hpp"

#include <algorithm>
#include <limits>

namespace planner {
namespace {

constexpr double kUnreachable = -std::numeric_limits<double>::infinity();

}  // namespace

Plan plan(const std::vector<Group>& groups, std::int64_t budget) {
  // The cheapest options are paid up front: the table then spans only what is left to decide on.
  std::vector<std::int64_t> base;
  for (const Group& group : groups) {
    base.push_back(*std::min_element(group.costs.begin(), group.costs.end()));
    budget -= base.back();
  }
  const std::size_t width = static_cast<std::size_t>(budget) + 1;

  // best[c]: highest value of the groups so far at surplus exactly c; taken[g * width + c]: how.
  std::vector<double> best(width, kUnreachable), next(width);
  std::vector<std::uint16_t> taken(groups.size() * width);
  best[0] = 0.0;
  for (std::size_t g = 0; g < groups.size(); ++g) {
    std::fill(next.begin(), next.end(), kUnreachable);
    std::uint16_t* const row = taken.data() + g * width;
    for (std::size_t option = 0; option < groups[g].costs.size(); ++option) {
      const std::int64_t surplus = groups[g].costs[option] - base[g];
      const double value = groups[g].values[option];
      for (std::int64_t c = surplus; c <= budget; ++c) {
        const double candidate = best[c - surplus] + value;
        if (candidate > next[c]) {
          next[c] = candidate;
          row[c] = static_cast<std::uint16_t>(option);
        }
      }
    }
    best.swap(next);
  }

  // max_element returns the first of equals: the cheapest.
  std::int64_t c = std::max_element(best.begin(), best.end()) - best.begin();
  Plan result{std::vector<std::int32_t>(groups.size()), best[c], 0};
  for (std::size_t g = groups.size(); g-- > 0;) {
    const std::uint16_t option = taken[g * width + c];
    result.choice[g] = option;
    result.cost += groups[g].costs[option];
    c -= groups[g].costs[option] - base[g];
  }
  return result;
}

}  // namespace planner
