// The module bilevel_fast.ops.native._C. Tensors come as addresses; everything else is converted
// here, and nothing is checked but what the Python callers cannot know.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <tuple>
#include <vector>

#include "adamw_ema.hpp"
#include "addresses.hpp"
#include "feature_kd.hpp"
#include "group_norm_silu.hpp"
#include "isa.hpp"
#include "philox.hpp"
#include "planner.hpp"

namespace py = pybind11;

namespace {

void bind_isa(py::module_& m) {
  m.def("instruction_sets", &isa::available);
  m.def("use_instruction_set", &isa::use, py::arg("name"));
}

void bind_planner(py::module_& m) {
  m.def(
      "plan",
      [](const std::vector<Counts>& costs, const std::vector<std::vector<double>>& values,
         std::int64_t budget, const std::vector<std::size_t>& lengths) {
        std::vector<planner::Group> groups;
        for (std::size_t g = 0; g < costs.size(); ++g) groups.push_back({costs[g], values[g]});
        const planner::Plan plan = planner::plan(groups, budget, lengths);
        return std::make_tuple(plan.choice, plan.value, plan.cost, plan.gap);
      },
      py::arg("costs"), py::arg("values"), py::arg("budget"), py::arg("lengths"), WithoutGil());
}

// Binds a function that fills out[samples][elements] of T.
template <typename T>
void bind_fill(py::module_& m, const char* name,
               void (*fill)(T*, std::int64_t, const philox::Request&)) {
  m.def(
      name,
      [fill](Address out, std::int64_t elements, std::uint64_t seed, std::uint32_t stream,
             Address indices, std::int64_t samples) {
        fill(pointer<T>(out), elements,
             {seed, stream, pointer<const std::int64_t>(indices), samples});
      },
      py::arg("out"), py::arg("elements"), py::arg("seed"), py::arg("stream"), py::arg("indices"),
      py::arg("samples"), WithoutGil());
}

void bind_philox(py::module_& m) {
  m.def("philox_block", &philox::block, py::arg("counter"), py::arg("key"));
  bind_fill<std::uint32_t>(m, "philox_words", &philox::words);
  bind_fill<float>(m, "philox_uniform", &philox::uniform);
  bind_fill<float>(m, "philox_normal", &philox::normal);
  m.def(
      "philox_integers",
      [](Address out, std::uint64_t high, std::uint64_t seed, std::uint32_t stream, Address indices,
         std::int64_t samples) {
        philox::integers(pointer<std::int64_t>(out), high,
                         {seed, stream, pointer<const std::int64_t>(indices), samples});
      },
      py::arg("out"), py::arg("high"), py::arg("seed"), py::arg("stream"), py::arg("indices"),
      py::arg("samples"), WithoutGil());
}

void bind_group_norm_silu(py::module_& m) {
  using Sizes = std::array<std::int64_t, 5>;
  const auto named = [](const Sizes& s) -> group_norm_silu::Shape {
    return {s[0], s[1], s[2], s[3], s[4]};
  };
  m.def(
      "group_norm_forward",
      [named](Address out, Address mean, Address rstd, Address x, Address weight, Address bias,
              const Sizes& shape, double eps, bool silu, int threads) {
        group_norm_silu::forward(pointer<float>(out), {pointer<float>(mean), pointer<float>(rstd)},
                                 pointer<const float>(x),
                                 {pointer<const float>(weight), pointer<const float>(bias)},
                                 named(shape), eps, silu, threads);
      },
      py::arg("out"), py::arg("mean"), py::arg("rstd"), py::arg("x"), py::arg("weight"),
      py::arg("bias"), py::arg("shape"), py::arg("eps"), py::arg("silu"), py::arg("threads"),
      WithoutGil());
  m.def(
      "group_norm_backward",
      [named](Address dx, Address dweight, Address dbias, Address dout, Address x, Address mean,
              Address rstd, Address weight, Address bias, const Sizes& shape, bool silu,
              int threads) {
        group_norm_silu::backward(pointer<float>(dx), pointer<float>(dweight),
                                  pointer<float>(dbias), pointer<const float>(dout),
                                  pointer<const float>(x),
                                  {pointer<const float>(mean), pointer<const float>(rstd)},
                                  {pointer<const float>(weight), pointer<const float>(bias)},
                                  named(shape), silu, threads);
      },
      py::arg("dx"), py::arg("dweight"), py::arg("dbias"), py::arg("dout"), py::arg("x"),
      py::arg("mean"), py::arg("rstd"), py::arg("weight"), py::arg("bias"), py::arg("shape"),
      py::arg("silu"), py::arg("threads"), WithoutGil());
}

void bind_feature_kd(py::module_& m) {
  m.def(
      "feature_kd",
      [](Address losses, const Addresses& gradients, const Addresses& students,
         const Addresses& teachers, const Counts& counts, const std::vector<float>& coefficients,
         int threads) {
        std::vector<feature_kd::Pair> pairs;
        for (std::size_t k = 0; k < counts.size(); ++k) {
          pairs.push_back({pointer<const float>(students[k]), pointer<const float>(teachers[k]),
                           pointer<float>(gradients[k]), counts[k], coefficients[k]});
        }
        feature_kd::run(pointer<float>(losses), pairs, threads);
      },
      py::arg("losses"), py::arg("gradients"), py::arg("students"), py::arg("teachers"),
      py::arg("counts"), py::arg("coefficients"), py::arg("threads"), WithoutGil());
}

void bind_adamw_ema(py::module_& m) {
  m.def(
      "adamw_ema",
      [](const Addresses& parameters, const Addresses& gradients, const Addresses& exp_avgs,
         const Addresses& exp_avg_sqs, const Addresses& emas, const Addresses& copies,
         const Counts& counts, double lr, double beta1, double beta2, double eps,
         double weight_decay, double clip, double ema_decay, std::int64_t number, int threads) {
        std::vector<adamw_ema::Tensor> tensors;
        for (std::size_t i = 0; i < counts.size(); ++i) {
          tensors.push_back({pointer<float>(parameters[i]), pointer<const float>(gradients[i]),
                             pointer<float>(exp_avgs[i]), pointer<float>(exp_avg_sqs[i]),
                             optional<float>(emas, i), optional<std::uint16_t>(copies, i),
                             counts[i]});
        }
        adamw_ema::run(tensors, {lr, beta1, beta2, eps, weight_decay, clip, ema_decay, number},
                       threads);
      },
      py::arg("parameters"), py::arg("gradients"), py::arg("exp_avgs"), py::arg("exp_avg_sqs"),
      py::arg("emas"), py::arg("copies"), py::arg("counts"), py::arg("lr"), py::arg("beta1"),
      py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"), py::arg("clip"),
      py::arg("ema_decay"), py::arg("number"), py::arg("threads"), WithoutGil());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native parts of bilevel_fast. Arguments are checked by the Python callers, not here.";
  bind_isa(m);
  bind_planner(m);
  bind_philox(m);
  bind_group_norm_silu(m);
  bind_feature_kd(m);
  bind_adamw_ema(m);
}
