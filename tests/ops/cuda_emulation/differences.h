// What the comparisons of CUDA with C++ code share.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <vector>

inline int num_differences = 0;

// Prints every difference above `tolerance`, relative to 1 or more.
template <typename T>
void expect_equal(const char* what, const std::vector<T>& cpp, const std::vector<T>& cuda, double tolerance) {
  for (std::size_t i = 0; i < cpp.size(); ++i) {
    if (cpp[i] == cuda[i] || std::abs(cpp[i] - cuda[i]) <= tolerance * (1 + std::abs(cpp[i]))) continue;
    std::printf("%s[%zu]: %.17g in C++, %.17g in CUDA\n", what, i, double(cpp[i]), double(cuda[i]));
    ++num_differences;
  }
}
