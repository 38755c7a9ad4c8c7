// The module bilevel_fast.ops.native._cuda, as bindings.cpp is of _C.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "addresses.hpp"
#include "cuda.hpp"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "A kernel of bilevel_fast. Arguments are checked by the Python callers, not here.";
  m.def(
      "adamw_ema",
      [](const Addresses& parameters, const Addresses& gradients, const Addresses& exp_avgs,
         const Addresses& exp_avg_sqs, const Addresses& emas, const Addresses& copies,
         const Counts& counts, double beta1, double beta2, double eps, double weight_decay,
         double ema_decay, Address lr, Address number, Address clip, Address skip, int device,
         Address stream) {
        std::vector<adamw_ema::Tensor> tensors;
        for (std::size_t i = 0; i < counts.size(); ++i) {
          tensors.push_back({pointer<float>(parameters[i]), pointer<const float>(gradients[i]),
                             pointer<float>(exp_avgs[i]), pointer<float>(exp_avg_sqs[i]),
                             optional<float>(emas, i), optional<std::uint16_t>(copies, i),
                             counts[i]});
        }
        adamw_ema::run_cuda(tensors, {beta1, beta2, eps, weight_decay, ema_decay},
                            {pointer<const float>(lr), pointer<const float>(number),
                             pointer<const float>(clip), pointer<const float>(skip)},
                            {device, pointer<void>(stream)});
      },
      py::arg("parameters"), py::arg("gradients"), py::arg("exp_avgs"), py::arg("exp_avg_sqs"),
      py::arg("emas"), py::arg("copies"), py::arg("counts"), py::arg("beta1"), py::arg("beta2"),
      py::arg("eps"), py::arg("weight_decay"), py::arg("ema_decay"), py::arg("lr"),
      py::arg("number"), py::arg("clip"), py::arg("skip"), py::arg("device"), py::arg("stream"),
      WithoutGil());
}
