// Multiple-choice knapsack, exactly: from each group take one option, so that the total value is
// the largest that the budget allows. Costs may have any number of digits: time and memory do not
// depend on the budget.
//
// A list of states, each the cost and value of what was taken so far, is carried from group to
// group. A state stays if no other is as cheap and as good, and if its upper bound beats the best
// plan known:
//
//   bound   value so far + linear relaxation of the groups to come, within the budget that is left
//
// The relaxation is concave and piecewise linear in that budget: it buys steps of the groups'
// concave hulls, best value per cost first. First the lists are cut to a few states of the highest
// bounds, for a good plan; then they may grow, until nothing was cut that could have beaten it,
// which proves it. (Dyer, Kayal and Walker, "A branch and bound algorithm for solving the
// multiple-choice knapsack problem", 1984; Pisinger, "A minimal algorithm for the multiple-choice
// knapsack problem", 1995.)
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace planner {

// Options of one group, at least one.
struct Group {
  std::vector<std::int64_t> costs;
  std::vector<double> values;  // finite
};

struct Plan {
  std::vector<std::int32_t> choice;  // option taken, per group
  double value;
  std::int64_t cost;
  double gap;  // how much more than `value` another plan may be worth; 0: proven to be none
};

// Plans are equally good if their values differ by less than this part of the relaxation of all
// groups, which is at most twice what the best plan is worth more than the cheapest one.
constexpr double kPrecision = 1e-11;

// The best plan of cost <= budget. `lengths` are the states that a list may have, 1 to 2^31, one
// try after the other. A state takes about 200 bytes while its group is decided, and 8 after.
//
// The caller has checked that a plan exists (the sum of the groups' least costs is within the
// budget), that the sum of the groups' largest absolute costs is below 2^62, and that twice that of
// their largest absolute values is finite.
Plan plan(const std::vector<Group>& groups, std::int64_t budget,
          const std::vector<std::size_t>& lengths);

}  // namespace planner
