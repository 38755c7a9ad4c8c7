#include "planner.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>
#include <utility>

namespace planner {
namespace {

constexpr double kNone = -std::numeric_limits<double>::infinity();

struct Option {
  std::int64_t cost;  // what it costs and is worth more than the group's cheapest option
  double value;
  std::int32_t number;  // the caller's
};

// An edge of a group's concave hull.
struct Step {
  std::size_t group, from, to;
  std::int64_t cost;
  double value;

  double rate() const { return value / static_cast<double>(cost); }
};

using Options = std::vector<Option>;        // ascending in cost and in value
using Choice = std::vector<std::uint32_t>;  // per group, an index into its options

// The options within the budget that no other is as cheap and as good as; of equal ones the first.
Options frontier(const Group& group, std::int64_t budget) {
  std::vector<std::int32_t> order(group.costs.size());
  std::iota(order.begin(), order.end(), 0);
  const auto rank = [&](std::int32_t i) {
    return std::make_tuple(group.costs[i], -group.values[i], i);
  };
  std::sort(order.begin(), order.end(),
            [&](std::int32_t i, std::int32_t j) { return rank(i) < rank(j); });
  const std::int64_t cost = group.costs[order.front()];
  const double value = group.values[order.front()];
  Options kept;
  double best = kNone;
  for (const std::int32_t i : order) {
    if (group.costs[i] - cost > budget) break;
    if (group.values[i] <= best) continue;
    best = group.values[i];
    kept.push_back({group.costs[i] - cost, best - value, i});
  }
  return kept;
}

// Puts values in units of a power of two, so that none is above 1; returns its exponent.
int rescale(std::vector<Options>& groups) {
  double largest = 0.0;
  for (const Options& options : groups) largest = std::max(largest, options.back().value);
  int exponent = 0;
  std::frexp(largest, &exponent);
  for (Options& options : groups) {
    for (Option& option : options) option.value = std::ldexp(option.value, -exponent);
  }
  return exponent;
}

Step step_between(const Options& options, std::size_t from, std::size_t to) {
  return {0, from, to, options[to].cost - options[from].cost,
          options[to].value - options[from].value};
}

// From the cheapest option to the dearest, of falling rate.
std::vector<Step> concave_hull(const Options& options) {
  std::vector<Step> hull;
  for (std::size_t i = 1; i < options.size(); ++i) {
    Step step = step_between(options, i - 1, i);
    while (!hull.empty() && step.rate() >= hull.back().rate()) {
      step = step_between(options, hull.back().from, i);
      hull.pop_back();
    }
    hull.push_back(step);
  }
  return hull;
}

// What is there to decide: groups in the order in which the lists take them, above their cheapest
// options.
struct Problem {
  Problem(const std::vector<Group>& given, std::int64_t limit);

  // Steps bought one after the other as long as the group's turn fits.
  Choice greedy() const;
  double value(const Choice& choice) const;

  int exponent;  // of the unit of values
  std::int64_t budget;
  std::vector<std::size_t> numbers;  // the caller's
  std::vector<Options> groups;
  std::vector<Step> steps;  // of all groups, best value per cost first
};

Problem::Problem(const std::vector<Group>& given, std::int64_t limit)
    : budget(limit), numbers(given.size()), groups(given.size()) {
  for (const Group& group : given) {
    budget -= *std::min_element(group.costs.begin(), group.costs.end());
  }
  std::vector<Options> options;
  for (const Group& group : given) options.push_back(frontier(group, budget));
  exponent = rescale(options);

  std::vector<std::vector<Step>> hulls;
  std::vector<std::int64_t> coarseness;
  for (const Options& mine : options) {
    hulls.push_back(concave_hull(mine));
    coarseness.push_back(0);
    for (const Step& step : hulls.back())
      coarseness.back() = std::max(coarseness.back(), step.cost);
  }
  // Groups of large steps come first: the relaxation of the others, left to come, is then nearly
  // their optimum.
  std::iota(numbers.begin(), numbers.end(), 0);
  std::stable_sort(numbers.begin(), numbers.end(),
                   [&](std::size_t i, std::size_t j) { return coarseness[i] > coarseness[j]; });
  for (std::size_t g = 0; g < numbers.size(); ++g) {
    groups[g] = std::move(options[numbers[g]]);
    for (Step& step : hulls[numbers[g]]) {
      step.group = g;
      steps.push_back(step);
    }
  }
  std::stable_sort(steps.begin(), steps.end(),
                   [](const Step& a, const Step& b) { return a.rate() > b.rate(); });
}

Choice Problem::greedy() const {
  Choice choice(groups.size(), 0);
  std::int64_t spare = budget;
  for (const Step& step : steps) {
    if (choice[step.group] != step.from || step.cost > spare) continue;
    choice[step.group] = static_cast<std::uint32_t>(step.to);
    spare -= step.cost;
  }
  return choice;
}

double Problem::value(const Choice& choice) const {
  double total = 0.0;
  for (std::size_t g = 0; g < groups.size(); ++g) total += groups[g][choice[g]].value;
  return total;
}

// Where the relaxation of some groups bends: `bought` is worth `worth`, and more is worth `rate`
// each, up to the next bend.
struct Bend {
  std::int64_t bought;
  double worth, rate;

  double at(std::int64_t budget) const {
    return worth + rate * static_cast<double>(budget - bought);
  }
};

// That of the groups from `first` on; the last bend is flat.
std::vector<Bend> relaxation(const Problem& problem, std::size_t first) {
  std::vector<Bend> bends;
  std::int64_t bought = 0;
  double worth = 0.0;
  for (const Step& step : problem.steps) {
    if (step.group < first) continue;
    bends.push_back({bought, worth, step.rate()});
    bought += step.cost;
    worth += step.value;
  }
  bends.push_back({bought, worth, 0.0});
  return bends;
}

struct State {
  std::int64_t cost;
  double value, bound;
  std::uint32_t parent, option;  // the state of the list before, and what was added to it

  bool before(const State& other) const {
    return std::make_tuple(cost, -value, parent, option) <
           std::make_tuple(other.cost, -other.value, other.parent, other.option);
  }
};

using States = std::vector<State>;  // ascending in cost and in value

// All states of a list with one option added, cheapest first.
class Run {
 public:
  Run(const States& list, std::int64_t budget, const std::vector<Bend>& bends, const Option& option,
      std::uint32_t number)
      : list_(&list),
        budget_(budget),
        bend_(&bends.back()),
        option_(&option),
        state_{0, 0.0, 0.0, 0, number} {}

  const State& state() const { return state_; }

  // Go on to the next state that the budget allows, worth more than `value` and of a bound above
  // `bound`; false if there is none.
  bool next(double value, double bound) {
    for (; index_ < list_->size(); ++index_) {
      const State& parent = (*list_)[index_];
      state_.cost = parent.cost + option_->cost;
      if (state_.cost > budget_) break;
      state_.value = parent.value + option_->value;
      if (state_.value <= value) continue;
      while (bend_->bought > budget_ - state_.cost) --bend_;  // the first one's is 0
      state_.bound = state_.value + bend_->at(budget_ - state_.cost);
      if (state_.bound <= bound) continue;
      state_.parent = static_cast<std::uint32_t>(index_++);
      return true;
    }
    return false;
  }

 private:
  const States* list_;
  std::int64_t budget_;
  const Bend* bend_;
  const Option* option_;
  State state_;
  std::size_t index_ = 0;
};

// Keeps the `length` states of the highest bounds, in their order. Where values are proportional to
// costs all bounds are equal: such states are kept from all over the list, as the golden ratio
// spreads their indices. Returns the highest bound that went.
double cut(States& states, std::size_t length) {
  if (states.size() <= length) return kNone;
  const auto rank = [&](std::size_t i) {
    return std::make_pair(-states[i].bound, std::uint64_t{i} * 0x9E3779B97F4A7C15);
  };
  std::vector<std::pair<double, std::uint64_t>> ranks(states.size());
  for (std::size_t i = 0; i < ranks.size(); ++i) ranks[i] = rank(i);
  const auto first_out = ranks.begin() + static_cast<std::ptrdiff_t>(length);
  std::nth_element(ranks.begin(), first_out, ranks.end());
  std::size_t kept = 0;
  for (std::size_t i = 0; i < states.size(); ++i) {
    if (rank(i) < *first_out) states[kept++] = states[i];
  }
  states.resize(kept);
  return -first_out->first;
}

struct Search {
  const Problem& problem;
  std::size_t length;
  double enough;          // a state of a bound no higher is not worth a look
  double missed = kNone;  // the highest bound that was cut off for want of space

  // Takes option after option of a group to all states. What is dominated by a state that was cut
  // may go, too: its bound is no higher.
  States taken(const States& list, std::size_t group) {
    const std::vector<Bend> bends = relaxation(problem, group + 1);
    std::vector<Run> heap;  // the run of the cheapest state on top
    const auto later = [](const Run& a, const Run& b) { return b.state().before(a.state()); };
    for (std::uint32_t option = 0; option < problem.groups[group].size(); ++option) {
      Run run(list, problem.budget, bends, problem.groups[group][option], option);
      if (run.next(kNone, enough)) heap.push_back(run);
    }
    std::make_heap(heap.begin(), heap.end(), later);
    States states;
    double best = kNone;
    while (!heap.empty()) {
      std::pop_heap(heap.begin(), heap.end(), later);
      Run& run = heap.back();
      if (run.state().value > best) {
        best = run.state().value;
        states.push_back(run.state());
        if (states.size() >= 2 * length) missed = std::max(missed, cut(states, length));
      }
      if (run.next(best, enough)) {
        std::push_heap(heap.begin(), heap.end(), later);
      } else {
        heap.pop_back();
      }
    }
    missed = std::max(missed, cut(states, length));
    return states;
  }

  // Replaces `best` by a better plan if these lists hold one.
  void run(Choice& best) {
    struct Back {
      std::uint32_t parent, option;
    };
    std::vector<std::vector<Back>> back;
    States list{{0, 0.0, 0.0, 0, 0}};
    for (std::size_t g = 0; g < problem.groups.size(); ++g) {
      list = taken(list, g);
      if (list.empty()) return;
      back.emplace_back();
      back.back().reserve(list.size());
      for (const State& state : list) back.back().push_back({state.parent, state.option});
    }
    std::size_t state = list.size() - 1;  // the dearest is the best
    for (std::size_t g = problem.groups.size(); g-- > 0;) {
      best[g] = back[g][state].option;
      state = back[g][state].parent;
    }
  }
};

}  // namespace

Plan plan(const std::vector<Group>& groups, std::int64_t budget,
          const std::vector<std::size_t>& lengths) {
  const Problem problem(groups, budget);
  Choice best = problem.greedy();
  const std::vector<Bend> bends = relaxation(problem, 0);
  const Bend* bend = &bends.back();
  while (bend->bought > problem.budget) --bend;
  double bound = bend->at(problem.budget);
  const double epsilon = kPrecision * bound;
  double gap = bound - problem.value(best);
  for (const std::size_t length : lengths) {
    if (gap <= epsilon) break;
    Search search{problem, length, problem.value(best) + epsilon};
    search.run(best);
    bound = std::min(bound, search.missed);
    gap = bound - problem.value(best);
  }
  Plan result{std::vector<std::int32_t>(groups.size()), 0.0, 0,
              gap > epsilon ? std::ldexp(gap, problem.exponent) : 0.0};
  for (std::size_t g = 0; g < groups.size(); ++g) {
    result.choice[problem.numbers[g]] = problem.groups[g][best[g]].number;
  }
  for (std::size_t g = 0; g < groups.size(); ++g) {
    result.value += groups[g].values[result.choice[g]];
    result.cost += groups[g].costs[result.choice[g]];
  }
  return result;
}

}  // namespace planner
