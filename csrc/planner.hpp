// Multiple-choice knapsack, exactly: from each group take one option, so that the total value is
// the largest that the budget allows. Dynamic programming over cost, O(options x budget) time and
// groups x budget x 2 bytes of back-pointers (Kellerer, Pferschy and Pisinger, "Knapsack
// Problems", 2004, section 11.5).
#pragma once

#include <cstdint>
#include <vector>

namespace planner {

// Options of one group; costs are whole non-negative units, values are finite.
struct Group {
  std::vector<std::int64_t> costs;
  std::vector<double> values;
};

struct Plan {
  std::vector<std::int32_t> choice;  // option taken, per group
  double value;
  std::int64_t cost;
};

// The best plan of cost <= budget; of equal values the cheaper one. The caller has checked that
// one exists: the sum of the groups' cheapest options is within the budget.
Plan plan(const std::vector<Group>& groups, std::int64_t budget);

}  // namespace planner
