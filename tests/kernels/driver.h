// A program around emulated kernels: reads tensors and numbers from a file, calls one function,
// writes its results to another. The other end is tests/cuda_emulation.py.
//
// A file is a sequence of records: a line `name bytes`, then that many bytes. Each input and output
// lies in memory of its own of exactly its size, so that the address sanitizer sees the first byte
// beyond it.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <string>

#include "cuda_emulation.h"

namespace driver {

[[noreturn]] inline void fail(const std::string& what) {
  std::cerr << "driver: " << what << std::endl;
  std::_Exit(2);
}

struct Record {
  void* data = nullptr;  // aligned to 16 bytes like device memory, or null when empty
  size_t bytes = 0;
};

inline Record allocate(size_t bytes) {
  if (bytes == 0) return {};
  void* data = std::malloc(bytes);
  if (data == nullptr) fail("out of memory");
  std::memset(data, 0xff, bytes);  // NaN and -1, so that what is never written is seen
  return {data, bytes};
}

class Call {
 public:
  explicit Call(const char* path) {
    std::ifstream file(path, std::ios::binary);
    std::string name;
    size_t bytes;
    while (file >> name >> bytes) {
      file.get();  // the end of the line
      inputs_[name] = allocate(bytes);
      if (bytes != 0) file.read(static_cast<char*>(inputs_[name].data), bytes);
      if (!file) fail("input file ends early");
    }
  }

  bool has(const std::string& name) const { return inputs_.count(name) != 0; }

  // Null when there is no such tensor, or when it is empty.
  template <class T>
  T* tensor(const std::string& name) {
    const auto found = inputs_.find(name);
    return found == inputs_.end() ? nullptr : static_cast<T*>(found->second.data);
  }

  size_t count_of(const std::string& name, size_t element_bytes) const {
    const auto found = inputs_.find(name);
    if (found == inputs_.end()) fail("no input " + name);
    return found->second.bytes / element_bytes;
  }

  int64_t integer(const std::string& name) {
    if (count_of(name, sizeof(int64_t)) != 1) fail(name + " is not one integer");
    return *tensor<int64_t>(name);
  }

  template <class T>
  T* output(const std::string& name, size_t count) {
    outputs_[name] = allocate(count * sizeof(T));
    return static_cast<T*>(outputs_[name].data);
  }

  void write(const char* path) const {
    std::ofstream file(path, std::ios::binary);
    for (const auto& [name, record] : outputs_) {
      file << name << ' ' << record.bytes << '\n';
      file.write(static_cast<const char*>(record.data), record.bytes);
    }
    if (!file.flush()) fail("cannot write the output file");
  }

 private:
  std::map<std::string, Record> inputs_, outputs_;
};

// `main` of a driver: arguments are the function's name, the input file and the output file. An
// input `seed` orders threads and blocks.
inline int run(int count, char** arguments, const std::map<std::string, void (*)(Call&)>& functions) {
  if (count != 4) fail("usage: DRIVER FUNCTION INPUT OUTPUT");
  const auto function = functions.find(arguments[1]);
  if (function == functions.end()) fail("no function " + std::string(arguments[1]));
  Call call(arguments[2]);
  if (call.has("seed")) cuda_emulation::shuffle(static_cast<uint64_t>(call.integer("seed")));
  function->second(call);
  call.write(arguments[3]);
  return 0;
}

}  // namespace driver
