#include <pybind11/pybind11.h>

#include "group_norm_silu.hpp"
#include "philox.hpp"
#include "planner.hpp"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native parts of bilevel_fast. Arguments are checked by the Python callers, not here.";
  register_group_norm_silu(m);
  register_philox(m);
  register_planner(m);
}
