// Memory of a kernel's own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace efficient_detr {

// Uninitialised numbers, aligned to cache lines.
template <class Number>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : numbers_(static_cast<Number*>(
            ::operator new(static_cast<size_t>(count) * sizeof(Number), std::align_val_t{64}))) {}
  ~Scratch() { ::operator delete(numbers_, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  Number* data() const { return numbers_; }

 private:
  Number* numbers_;
};

}  // namespace efficient_detr
