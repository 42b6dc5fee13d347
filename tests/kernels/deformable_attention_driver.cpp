// Multi-scale deformable attention on the emulated CUDA grid: launchers and kernels, unchanged.
#include "../../kernels/deformable_attention/cuda.cu"

#include <vector>

#include "driver.h"

namespace {

using namespace efficient_detr;

void check(cudaError_t error) {
  if (error != cudaSuccess) driver::fail(cudaGetErrorString(error));
}

struct Problem {
  Storage storage;
  Sizes sizes;
  Sampling sampling;
  std::vector<Level> levels;

  explicit Problem(driver::Call& call) : storage(static_cast<Storage>(call.integer("storage"))) {
    const int64_t* shapes = call.tensor<int64_t>("spatial_shapes");
    const auto count = static_cast<int64_t>(call.count_of("spatial_shapes", 16));
    int64_t tokens = 0;
    for (int64_t i = 0; i < count; ++i) {
      levels.push_back({static_cast<int32_t>(shapes[2 * i]),
                        static_cast<int32_t>(shapes[2 * i + 1]), static_cast<int32_t>(tokens)});
      tokens += shapes[2 * i] * shapes[2 * i + 1];
    }
    sizes = {call.integer("images"),  tokens, call.integer("heads"), call.integer("channels"),
             call.integer("queries"), count,  call.integer("points"), levels.data()};
    if (const char* limit = cuda_limit(sizes)) driver::fail(limit);
    sampling.locations = call.tensor<void>("locations");
    sampling.weights = call.tensor<void>("weights");
    sampling.reference = call.tensor<void>("reference");
    sampling.offsets = call.tensor<void>("offsets");
    sampling.logits = call.tensor<void>("logits");
    sampling.reference_size = static_cast<int>(call.integer("reference_size"));
  }

  size_t bytes() const { return bytes_of(storage); }

  // A tensor in `storage`; with the input `misaligned`, it is a view that begins one element behind
  // a multiple of 16 bytes.
  const void* stored(driver::Call& call, const std::string& name) const {
    void* aligned = call.tensor<void>(name);
    if (call.integer("misaligned") == 0 || aligned == nullptr) return aligned;
    const size_t size = call.count_of(name, 1);
    char* view = static_cast<char*>(driver::allocate(size + bytes()).data) + bytes();
    std::memcpy(view, aligned, size);
    return view;
  }

  size_t real_bytes() const { return storage == Storage::Float64 ? 8 : 4; }
  int64_t queries() const { return sizes.images * sizes.queries; }
  int64_t outputs() const { return queries() * sizes.heads * sizes.channels; }
  int64_t weights() const { return queries() * sizes.heads * sizes.levels * sizes.points; }
};

void forward(driver::Call& call) {
  const Problem problem(call);
  auto* output = call.output<char>("output", problem.outputs() * problem.bytes());
  check(cuda_forward({problem.storage, problem.sizes, problem.sampling,
                      problem.stored(call, "value"), output},
                     nullptr));
}

void backward(driver::Call& call) {
  const Problem problem(call);
  const size_t real = problem.real_bytes();
  BackwardProblem backward = {
      problem.storage,
      problem.sizes,
      problem.sampling,
      problem.stored(call, "value"),
      problem.stored(call, "grad_output"),
      call.output<char>("grad_value", elements_of_value(problem.sizes) * problem.bytes()),
      call.output<char>("grad_points", problem.weights() * 2 * real),
      call.output<char>("grad_weights", problem.weights() * real),
      nullptr};
  if (call.integer("needs_reference_gradient") != 0)
    backward.grad_reference = call.output<char>(
        "grad_reference", problem.queries() * problem.sizes.levels *
                              problem.sampling.reference_size * real);
  const bool deterministic = call.integer("deterministic") != 0;
  const int64_t bytes = cuda_backward_workspace(backward, deterministic);
  check(cuda_backward(backward, deterministic, call.output<char>("workspace", bytes), nullptr));
}

}  // namespace

int main(int count, char** arguments) {
  return driver::run(count, arguments, {{"forward", forward}, {"backward", backward}});
}
