#include "cuda.h"

#include <algorithm>
#include <type_traits>

#include "cuda.cuh"

namespace efficient_detr {
namespace {

using namespace deformable_attention;

constexpr int64_t most_grid_rows = 65535;   // blocks along y and along z
constexpr int64_t most_points = 1 << 20;    // L P, see Group::point
constexpr int64_t most_int32 = 0x7fffff00;  // steps of up to 256 beyond it end below 2^31

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs steps until one fails.
class Steps {
 public:
  template <class Step>
  Steps& then(const Step& step) {
    if (error_ == cudaSuccess) error_ = step();
    return *this;
  }
  cudaError_t error() const { return error_; }

 private:
  cudaError_t error_ = cudaSuccess;
};

// --------------------------------------------------------------------------------------- arguments

template <class T>
void fill(const Sizes& sizes, const Sampling& sampling, const void* value, Arguments<T>& to) {
  using Real = typename Element<T>::Real;
  const bool fused = sampling.logits != nullptr;
  to.value = static_cast<const T*>(value);
  to.points = static_cast<const Real*>(fused ? sampling.offsets : sampling.locations);
  to.weights = static_cast<const Real*>(fused ? sampling.logits : sampling.weights);
  to.reference = static_cast<const Real*>(sampling.reference);
  to.reference_size = sampling.reference_size;
  to.queries = static_cast<int32_t>(sizes.queries);
  to.heads = static_cast<int32_t>(sizes.heads);
  to.channels = static_cast<int32_t>(sizes.channels);
  to.levels = static_cast<int32_t>(sizes.levels);
  to.points_of_level = static_cast<int32_t>(sizes.points);
  to.points_of_query = static_cast<int32_t>(sizes.levels * sizes.points);
  to.per_point = 1.0f / static_cast<float>(sizes.points);
  to.token_elements = static_cast<int32_t>(sizes.heads * sizes.channels);
  to.image_elements = sizes.tokens * to.token_elements;
  for (int64_t i = 0; i < sizes.levels; ++i) {
    const Level& level = sizes.level[i];
    to.level[i] = {level.height, level.width, level.start,
                   level.width > 1 ? to.token_elements : 0,
                   level.height > 1 ? level.width * to.token_elements : 0};
  }
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Calls `run` with how many channels a lane holds and how many lanes a group has.
template <int V, int G>
struct Shape {
  static constexpr int channels_of_lane = V, lanes = G;
};

template <class T, class Run>
cudaError_t with_shape(const Sizes& sizes, bool vectors, const Run& run) {
  if constexpr (!std::is_same_v<T, double>) {
    constexpr int V = Element<T>::per_vector;
    if (vectors && sizes.channels == 16) return run(Shape<V, 16 / V>{});
    if (vectors && sizes.channels == 32) return run(Shape<V, 32 / V>{});
    if (vectors && sizes.channels == 64) return run(Shape<V, 64 / V>{});
  }
  return run(Shape<1, 32>{});
}

template <class Run>
cudaError_t with_element(Storage storage, const Run& run) {
  switch (storage) {
    case Storage::Float32:
      return run(float{});
    case Storage::Float64:
      return run(double{});
    case Storage::Float16:
      return run(__half{});
    case Storage::BFloat16:
      return run(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

// A kernel with one group of lanes for each (image, head, query).
template <int G, class Given>
cudaError_t launch_groups(void (*kernel)(Given), Given arguments, int64_t images,
                          cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(divided_up(arguments.queries, block_threads / G));
  for (int64_t first = 0; first < images; first += most_grid_rows) {
    arguments.first_image = static_cast<int32_t>(first);
    const dim3 grid(blocks, static_cast<unsigned>(arguments.heads),
                    static_cast<unsigned>(std::min(images - first, most_grid_rows)));
    const cudaError_t error = launch(kernel, grid, block_threads, 0, stream, arguments);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// ----------------------------------------------------------------------------------------- forward

template <class T>
cudaError_t run_forward(const ForwardProblem& problem, cudaStream_t stream) {
  const Sizes& sizes = problem.sizes;
  ForwardArguments<T> arguments = {};
  fill(sizes, problem.sampling, problem.value, arguments);
  arguments.output = static_cast<T*>(problem.output);
  const bool vectors = is_aligned(problem.value) && is_aligned(problem.output);
  return with_shape<T>(sizes, vectors, [&](auto shape) {
    using S = decltype(shape);
    constexpr int V = S::channels_of_lane, G = S::lanes;
    return launch_groups<G>(forward_kernel<T, V, G>, arguments, sizes.images, stream);
  });
}

// ---------------------------------------------------------------------------------------- backward

int64_t elements_of_value(const Sizes& sizes) {
  return sizes.images * sizes.tokens * sizes.heads * sizes.channels;
}

size_t bytes_of(Storage storage) {
  return storage == Storage::Float64 ? 8 : storage == Storage::Float32 ? 4 : 2;
}

bool has_terms(const Sizes& sizes) {
  return sizes.images * sizes.queries * sizes.heads * sizes.levels * sizes.points > 0 &&
         sizes.channels > 0;
}

template <class T>
cudaError_t queue_maximum(const void* numbers, int64_t count, unsigned long long* maximum,
                          cudaStream_t stream) {
  const int64_t blocks = std::min<int64_t>(divided_up(count, elementwise_threads * 4), 1024);
  return launch(absolute_maximum_kernel<T>, static_cast<unsigned>(blocks), elementwise_threads, 0,
                stream, static_cast<const T*>(numbers), count, maximum);
}

template <class T, class Sum>
cudaError_t queue_conversion(const Sum* sums, const BackwardProblem& problem,
                             const FixedPoint& fixed_point, cudaStream_t stream) {
  const int64_t count = elements_of_value(problem.sizes);
  const int64_t blocks = divided_up(count, elementwise_threads * converted_per_thread);
  return launch(convert_kernel<T, Sum>, static_cast<unsigned>(blocks), elementwise_threads, 0,
                stream, sums, count, static_cast<T*>(problem.grad_value), fixed_point);
}

template <class Real>
cudaError_t queue_reference(const BackwardProblem& problem, cudaStream_t stream) {
  const Sizes& sizes = problem.sizes;
  LevelSizes levels = {};
  for (int64_t i = 0; i < sizes.levels; ++i) {
    levels.height[i] = sizes.level[i].height;
    levels.width[i] = sizes.level[i].width;
  }
  const int64_t places = sizes.images * sizes.queries;
  const int64_t blocks = divided_up(places * sizes.levels, elementwise_threads / 32);
  return launch(finish_reference_kernel<Real>, static_cast<unsigned>(blocks), elementwise_threads,
                0, stream, static_cast<const Real*>(problem.sampling.reference),
                problem.sampling.reference_size,
                static_cast<const Real*>(problem.sampling.offsets),
                static_cast<Real*>(problem.grad_locations),
                static_cast<Real*>(problem.grad_reference), places,
                static_cast<int>(sizes.heads), static_cast<int>(sizes.levels),
                static_cast<int>(sizes.points), levels);
}

template <class T, class Sum>
BackwardArguments<T, Sum> backward_arguments(const BackwardProblem& problem, Sum* sums) {
  using Real = typename Element<T>::Real;
  BackwardArguments<T, Sum> arguments = {};
  fill(problem.sizes, problem.sampling, problem.value, arguments);
  arguments.grad_output = static_cast<const T*>(problem.grad_output);
  arguments.grad_value = sums;
  arguments.grad_points = static_cast<Real*>(problem.grad_locations);
  arguments.grad_weights = static_cast<Real*>(problem.grad_weights);
  arguments.gradient_of_locations = problem.grad_reference != nullptr;
  return arguments;
}

// Sums in Real: in place where the gradient is stored so, else in the workspace.
template <class T>
cudaError_t run_backward(const BackwardProblem& problem, void* workspace, cudaStream_t stream) {
  using Real = typename Element<T>::Real;
  constexpr bool in_place = std::is_same_v<T, Real>;
  Real* const sums = static_cast<Real*>(in_place ? problem.grad_value : workspace);
  const auto arguments = backward_arguments<T>(problem, sums);
  const bool vectors = is_aligned(problem.value) && is_aligned(problem.grad_output) &&
                       is_aligned(sums);
  const auto run = [&](auto shape) {
    using S = decltype(shape);
    constexpr int V = S::channels_of_lane, G = S::lanes;
    return launch_groups<G>(backward_kernel<T, Real, V, G>, arguments, problem.sizes.images,
                            stream);
  };
  Steps steps;
  steps.then([&] {
    const size_t bytes = elements_of_value(problem.sizes) * sizeof(Real);
    return cudaMemsetAsync(sums, 0, bytes, stream);
  });
  steps.then([&] { return with_shape<T>(problem.sizes, vectors, run); });
  if constexpr (!in_place)
    steps.then([&] { return queue_conversion<T>(sums, problem, {}, stream); });
  return steps.error();
}

// Sums in fixed point, in the workspace: int64 for each element of the value, then two maxima.
template <class T>
cudaError_t run_deterministic_backward(const BackwardProblem& problem, void* workspace,
                                       cudaStream_t stream) {
  using Real = typename Element<T>::Real;
  constexpr int G = 32;
  const Sizes& sizes = problem.sizes;
  const bool fused = problem.sampling.logits != nullptr;
  const int64_t elements = elements_of_value(sizes);
  const int64_t rows = sizes.images * sizes.queries * sizes.heads;
  auto* const sums = static_cast<long long*>(workspace);
  auto* const maxima = reinterpret_cast<unsigned long long*>(sums + elements);
  auto arguments = backward_arguments<T>(problem, sums);
  arguments.fixed_point = {maxima, 0, fused};
  while (int64_t{1} << arguments.fixed_point.count_bits < sizes.queries * sizes.points)
    ++arguments.fixed_point.count_bits;
  Steps steps;
  steps.then([&] { return cudaMemsetAsync(sums, 0, (elements + 2) * sizeof(long long), stream); });
  steps.then([&] {
    return queue_maximum<T>(problem.grad_output, rows * sizes.channels, maxima, stream);
  });
  if (!fused)
    steps.then([&] {
      return queue_maximum<Real>(problem.sampling.weights, rows * sizes.levels * sizes.points,
                                 maxima + 1, stream);
    });
  steps.then([&] {
    return launch_groups<G>(backward_kernel<T, long long, 1, G>, arguments, sizes.images, stream);
  });
  steps.then([&] { return queue_conversion<T>(sums, problem, arguments.fixed_point, stream); });
  return steps.error();
}

// What remains of the gradients where no point samples anything.
cudaError_t zero_gradients(const BackwardProblem& problem, cudaStream_t stream) {
  const Sizes& sizes = problem.sizes;
  const size_t real = problem.storage == Storage::Float64 ? 8 : 4;
  const int64_t points =
      sizes.images * sizes.queries * sizes.heads * sizes.levels * sizes.points;
  Steps steps;
  const auto zero = [&](void* address, size_t bytes) {
    if (address != nullptr && bytes != 0)
      steps.then([&] { return cudaMemsetAsync(address, 0, bytes, stream); });
  };
  zero(problem.grad_value, elements_of_value(sizes) * bytes_of(problem.storage));
  zero(problem.grad_locations, points * 2 * real);
  zero(problem.grad_weights, points * real);
  zero(problem.grad_reference, sizes.images * sizes.queries * sizes.levels *
                                   problem.sampling.reference_size * real);
  return steps.error();
}

}  // namespace

const char* cuda_limit(const Sizes& sizes) {
  if (sizes.levels > most_levels) return "there can be at most 32 levels";
  if (sizes.heads > most_grid_rows) return "there can be at most 65535 heads";
  if (sizes.queries > most_int32) return "there can be at most 2^31 - 256 queries";
  if (sizes.images > most_int32) return "there can be at most 2^31 - 256 images";
  if (sizes.tokens > 0 && sizes.heads * sizes.channels > most_int32 / sizes.tokens)
    return "the value of one image can have at most 2^31 - 256 elements";
  if (sizes.levels > 0 && sizes.points > most_points / sizes.levels)
    return "there can be at most 2^20 points a query";
  if (sizes.heads > 0 && sizes.points > most_int32 / sizes.heads)
    return "all heads together can have at most 2^31 - 256 points a level";
  return nullptr;
}

int64_t cuda_backward_workspace(const BackwardProblem& problem, bool deterministic) {
  const int64_t elements = elements_of_value(problem.sizes);
  if (deterministic) return (elements + 2) * static_cast<int64_t>(sizeof(int64_t));
  return bytes_of(problem.storage) == 2 ? elements * static_cast<int64_t>(sizeof(float)) : 0;
}

cudaError_t cuda_forward(const ForwardProblem& problem, cudaStream_t stream) {
  const Sizes& sizes = problem.sizes;
  if (cuda_limit(sizes) != nullptr) return cudaErrorInvalidValue;
  const int64_t outputs = sizes.images * sizes.queries * sizes.heads * sizes.channels;
  if (outputs == 0) return cudaSuccess;
  if (!has_terms(sizes))
    return cudaMemsetAsync(problem.output, 0, outputs * bytes_of(problem.storage), stream);
  return with_element(problem.storage, [&](auto element) {
    return run_forward<decltype(element)>(problem, stream);
  });
}

cudaError_t cuda_backward(const BackwardProblem& problem, bool deterministic, void* workspace,
                          cudaStream_t stream) {
  if (cuda_limit(problem.sizes) != nullptr) return cudaErrorInvalidValue;
  if (!has_terms(problem.sizes)) return zero_gradients(problem, stream);
  Steps steps;
  steps.then([&] {
    return with_element(problem.storage, [&](auto element) {
      using T = decltype(element);
      return deterministic ? run_deterministic_backward<T>(problem, workspace, stream)
                           : run_backward<T>(problem, workspace, stream);
    });
  });
  if (problem.grad_reference != nullptr)
    steps.then([&] {
      return problem.storage == Storage::Float64 ? queue_reference<double>(problem, stream)
                                                 : queue_reference<float>(problem, stream);
    });
  return steps.error();
}

}  // namespace efficient_detr
