#include <pybind11/pybind11.h>

#include "philox.hpp"
#include "planner.hpp"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native parts of bilevel_fast. Arguments are checked by the Python callers, not here.";
  register_philox(m);
  register_planner(m);
}
