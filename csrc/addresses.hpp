// How bindings see tensors.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <vector>

using Address = std::uintptr_t;
using Addresses = std::vector<Address>;
using Counts = std::vector<std::int64_t>;
using WithoutGil = pybind11::call_guard<pybind11::gil_scoped_release>;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Element i, or null where the list is empty: the tensors are not wanted.
template <typename T>
T* optional(const Addresses& addresses, std::size_t i) {
  return addresses.empty() ? nullptr : pointer<T>(addresses[i]);
}
