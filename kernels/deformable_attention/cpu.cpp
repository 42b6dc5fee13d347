#include "cpu.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu_points.h"
#include "cpu_rows.h"

namespace efficient_detr {
namespace {

// Calls part(first channel, constant) for blocks of 4, 2 and 1 vectors of channels, as many as
// fit, and rest(channel) for the channels that fill no vector.
template <class Real, class Part, class Rest>
ED_INLINE void for_channels(int64_t channels, const Part& part, const Rest& rest) {
  constexpr int64_t lanes = Simd<Real>::lanes;
  int64_t c = 0;
  for (; c + 4 * lanes <= channels; c += 4 * lanes) part(c, std::integral_constant<int, 4>{});
  if (c + 2 * lanes <= channels) {
    part(c, std::integral_constant<int, 2>{});
    c += 2 * lanes;
  }
  if (c + lanes <= channels) {
    part(c, std::integral_constant<int, 1>{});
    c += lanes;
  }
  for (; c < channels; ++c) rest(c);
}

// ----------------------------------------------------------------------------------------- forward

// Adds up all corners of all points in `Vectors` vectors of channels.
template <int Vectors, class Real>
ED_INLINE void gather_block(const Points<Real>& points, Rows<const Real> value, Real* output) {
  constexpr int64_t lanes = Simd<Real>::lanes;
  // As many sums as keep the multiply-add units busy and still fit into the registers.
  constexpr int sets = Vectors >= 4 ? 2 : 4;
  typename Simd<Real>::Vector sums[sets][Vectors] = {};
  for (int64_t point = 0; point < points.count; ++point) {
#pragma GCC unroll 4
    for (int corner = 0; corner < 4; ++corner) {
      const Real* row = value[points.corner_row(corner)[point]];
      const Real weight = points.corner_weight(corner)[point];
#pragma GCC unroll 4
      for (int i = 0; i < Vectors; ++i) sums[corner % sets][i] += weight * load(row + i * lanes);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < Vectors; ++i) {
    auto total = sums[0][i];
#pragma GCC unroll 4
    for (int set = 1; set < sets; ++set) total += sums[set][i];
    store(output + i * lanes, total);
  }
}

template <class Real>
ED_INLINE Real gather_channel(const Points<Real>& points, Rows<const Real> value) {
  Real total = 0;
  for (int64_t point = 0; point < points.count; ++point) {
    for (int corner = 0; corner < 4; ++corner) {
      total += points.corner_weight(corner)[point] * *value[points.corner_row(corner)[point]];
    }
  }
  return total;
}

template <class Real>
ED_INLINE void gather(const Points<Real>& points, Rows<const Real> value, int64_t channels,
                      Real* output) {
  for_channels<Real>(
      channels,
      [&](int64_t c, auto vectors) __attribute__((always_inline)) {
        gather_block<vectors.value>(points, Rows<const Real>{value.data + c, value.stride},
                                    output + c);
      },
      [&](int64_t c) __attribute__((always_inline)) {
        output[c] = gather_channel(points, Rows<const Real>{value.data + c, value.stride});
      });
}

// Queries ahead of the present one whose points are fetched into the cache.
constexpr int64_t queries_ahead = 4;

// `row` receives the output of a query unless it can be written where it belongs.
template <class Real>
ED_INLINE void forward_head(const ForwardProblem& problem, Rows<const Real> value, int64_t image,
                            int64_t head, int64_t first_query, int64_t last_query,
                            const Points<Real>& points, Real* row) {
  const Sizes& sizes = problem.sizes;
  const Heads<Real> heads{problem.storage, sizes.heads, sizes.channels};
  const Reader<Real> reader(sizes, problem.sampling, points);
  const bool real = stores_reals(problem.storage);
  for (int64_t q = first_query; q < last_query; ++q) {
    const int64_t query = image * sizes.queries + q;
    if (q + queries_ahead < last_query) reader.prefetch(query + queries_ahead, head);
    reader.read(query, head);
    points.find_corners();
    if (real) {
      gather(points, value, sizes.channels,
             heads.rows(static_cast<Real*>(problem.output), query, head).data);
    } else {
      gather(points, value, sizes.channels, row);
      heads.write(Rows<const Real>{row, 0}, 1, problem.output, query, head);
    }
  }
}

// The rows of one head's value. They are copied next to each other first where that pays.
template <class Real>
class HeadValue {
 public:
  HeadValue(Storage storage, const Sizes& sizes, const void* value)
      : sizes_(sizes),
        heads_{storage, sizes.heads, sizes.channels},
        value_(value),
        copies_(wants_copy(storage, sizes)),
        copy_(copies_ ? sizes.tokens * sizes.channels : 0) {}

  ED_INLINE Rows<const Real> operator()(int64_t image, int64_t head) {
    const int64_t first_token = image * sizes_.tokens;
    if (!copies_) return heads_.rows(static_cast<const Real*>(value_), first_token, head);
    const Rows<Real> copy{copy_.data(), sizes_.channels};
    if (copied_ != image * sizes_.heads + head) {
      heads_.read(value_, first_token, head, sizes_.tokens, copy);
    }
    copied_ = image * sizes_.heads + head;
    return {copy.data, copy.stride};
  }

 private:
  // 16-bit values must be converted anyway. Else it pays (measured) when a row is read more than
  // twice, because then the cache holds most of the rows that are read.
  static bool wants_copy(Storage storage, const Sizes& sizes) {
    const int64_t reads = 4 * sizes.levels * sizes.points * sizes.queries;
    return !stores_reals(storage) || reads >= 2 * sizes.tokens;
  }

  const Sizes& sizes_;
  const Heads<Real> heads_;
  const void* const value_;
  const bool copies_;
  const Scratch<Real> copy_;
  int64_t copied_ = -1;
};

template <class Real>
ED_INLINE void forward_range(const ForwardProblem& problem, int64_t tasks, int64_t first_task,
                             int64_t last_task) {
  const Sizes& sizes = problem.sizes;
  const int64_t parts = tasks / (sizes.images * sizes.heads);
  const Points<Real> points(sizes);
  const Scratch<Real> row(sizes.channels);
  HeadValue<Real> value(problem.storage, sizes, problem.value);
  for (int64_t task = first_task; task < last_task; ++task) {
    const int64_t part = task % parts;
    const int64_t image = task / parts / sizes.heads, head = task / parts % sizes.heads;
    forward_head(problem, value(image, head), image, head, sizes.queries * part / parts,
                 sizes.queries * (part + 1) / parts, points, row.data());
  }
}

// ---------------------------------------------------------------------------------------- backward

// For `Vectors` vectors of channels: scatters the gradient of a query's output to one corner and
// returns the parts of <gradient, value at the corner>.
template <int Vectors, class Vector, class Real>
ED_INLINE Vector scatter_row(const Vector (&gradient)[Vectors], Real weight, const Real* value,
                             Real* grad_value) {
  constexpr int64_t lanes = Simd<Real>::lanes;
  Vector product{};
#pragma GCC unroll 4
  for (int i = 0; i < Vectors; ++i) {
    product += gradient[i] * load(value + i * lanes);
    store(grad_value + i * lanes, load(grad_value + i * lanes) + weight * gradient[i]);
  }
  return product;
}

// The same for all corners of all points; adds to the products unless these are the first channels.
template <int Vectors, class Real>
ED_INLINE void scatter_block(const Points<Real>& points, const Real* grad_output,
                             Rows<const Real> value, Rows<Real> grad_value, bool first_channels) {
  constexpr int64_t lanes = Simd<Real>::lanes;
  using Vector = typename Simd<Real>::Vector;
  Vector gradient[Vectors];
#pragma GCC unroll 4
  for (int i = 0; i < Vectors; ++i) gradient[i] = load(grad_output + i * lanes);
  for (int64_t first = 0; first < points.count; first += lanes) {
    const int64_t count = std::min(lanes, points.count - first);
#pragma GCC unroll 1
    for (int corner = 0; corner < 4; ++corner) {
      const auto* rows = points.corner_row(corner) + first;
      const Real* weights = points.corner_weight(corner) + first;
      Vector products[lanes];
      const auto scatter_point = [&](int64_t point) __attribute__((always_inline)) {
        products[point] = scatter_row(gradient, weights[point], value[rows[point]],
                                      grad_value[rows[point]]);
      };
      if (count == lanes) {
#pragma GCC unroll 8
        for (int64_t point = 0; point < lanes; ++point) scatter_point(point);
      } else {
        for (int64_t point = 0; point < lanes; ++point) products[point] = Vector{};
        for (int64_t point = 0; point < count; ++point) scatter_point(point);
      }
      Real* total = points.product(corner) + first;
      store(total, first_channels ? sums(products) : load(total) + sums(products));
    }
  }
}

template <class Real>
ED_INLINE void scatter_channel(const Points<Real>& points, Real grad_output, Rows<const Real> value,
                               Rows<Real> grad_value) {
  for (int corner = 0; corner < 4; ++corner) {
    for (int64_t point = 0; point < points.count; ++point) {
      const int64_t row = points.corner_row(corner)[point];
      points.product(corner)[point] += grad_output * *value[row];
      *grad_value[row] += grad_output * points.corner_weight(corner)[point];
    }
  }
}

template <class Real>
ED_INLINE void scatter(const Points<Real>& points, const Real* grad_output, Rows<const Real> value,
                       Rows<Real> grad_value, int64_t channels) {
  if (channels < Simd<Real>::lanes) {
    std::fill_n(points.product(0), 4 * points.padded, Real{0});
  }
  for_channels<Real>(
      channels,
      [&](int64_t c, auto vectors) __attribute__((always_inline)) {
        scatter_block<vectors.value>(points, grad_output + c,
                                     Rows<const Real>{value.data + c, value.stride},
                                     Rows<Real>{grad_value.data + c, grad_value.stride}, c == 0);
      },
      [&](int64_t c) __attribute__((always_inline)) {
        scatter_channel(points, grad_output[c], Rows<const Real>{value.data + c, value.stride},
                        Rows<Real>{grad_value.data + c, grad_value.stride});
      });
}

// Gradients of the locations and weights of one query and head, from the products.
template <class Real>
class GradientWriter {
 public:
  GradientWriter(const BackwardProblem& problem, const Points<Real>& points)
      : problem_(problem),
        points_(points),
        fused_(problem.sampling.is_fused()),
        // With a gradient of the reference, a later step needs those of the locations.
        of_offsets_(fused_ && problem.grad_reference == nullptr) {}

  ED_INLINE void write(int64_t query, int64_t head) const {
    const int64_t first = (query * problem_.sizes.heads + head) * points_.count;
    Real* grad_locations = static_cast<Real*>(problem_.grad_locations) + 2 * first;
    Real* grad_weights = static_cast<Real*>(problem_.grad_weights) + first;
    Vector total{};
    for (int64_t point = 0; point < points_.count; point += lanes) {
      const auto gradient = gradients(point);
      store(points_.grad_weight() + point, gradient.weight);
      total += load(points_.weight() + point) * gradient.weight;
      write_pairs(gradient.x, gradient.y, points_.count - point, grad_locations + 2 * point);
    }
    if (fused_) through_softmax(sum(total));
    copy_row<Real>(points_.grad_weight(), grad_weights, points_.count);
  }

 private:
  using Vector = typename Simd<Real>::Vector;
  static constexpr int64_t lanes = Simd<Real>::lanes;

  ED_INLINE PointGradient<Vector> gradients(int64_t point) const {
    auto result = point_gradient(
        points_.across(point), points_.down(point), load(points_.width() + point),
        load(points_.height() + point), load(points_.weight() + point),
        load(points_.product(0) + point), load(points_.product(1) + point),
        load(points_.product(2) + point), load(points_.product(3) + point));
    if (of_offsets_) {
      result.x = chained(result.x, load(points_.scale_x() + point));
      result.y = chained(result.y, load(points_.scale_y() + point));
    }
    return result;
  }

  ED_INLINE static void write_pairs(Vector x, Vector y, int64_t count, Real* to) {
    if (count >= lanes) {
      store(to, interleaved_low(x, y));
      store(to + lanes, interleaved_high(x, y));
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      to[2 * i] = x[i];
      to[2 * i + 1] = y[i];
    }
  }

  // weight * (gradient - sum of weight * gradient)
  ED_INLINE void through_softmax(Vector total) const {
    for (int64_t point = 0; point < points_.padded; point += lanes) {
      Real* gradient = points_.grad_weight() + point;
      store(gradient, load(points_.weight() + point) * (load(gradient) - total));
    }
  }

  const BackwardProblem& problem_;
  const Points<Real>& points_;
  const bool fused_, of_offsets_;
};

template <class Real>
ED_INLINE void backward_head(const BackwardProblem& problem, Rows<const Real> value,
                             Rows<Real> grad_value, int64_t image, int64_t head,
                             const Points<Real>& points, Real* row) {
  const Sizes& sizes = problem.sizes;
  const Heads<Real> heads{problem.storage, sizes.heads, sizes.channels};
  const Reader<Real> reader(sizes, problem.sampling, points);
  const GradientWriter<Real> writer(problem, points);
  const bool real = stores_reals(problem.storage);
  for (int64_t q = 0; q < sizes.queries; ++q) {
    const int64_t query = image * sizes.queries + q;
    auto gradient = heads.rows(static_cast<const Real*>(problem.grad_output), query, head);
    if (q + queries_ahead < sizes.queries) {
      reader.prefetch(query + queries_ahead, head);
      __builtin_prefetch(gradient[queries_ahead]);
      __builtin_prefetch(gradient[queries_ahead] + 64 / sizeof(Real));
    }
    if (!real) {
      heads.read(problem.grad_output, query, head, 1, Rows<Real>{row, 0});
      gradient = {row, 0};
    }
    reader.read(query, head);
    points.find_corners();
    scatter(points, gradient.data, value, grad_value, sizes.channels);
    writer.write(query, head);
  }
}

template <class Real>
ED_INLINE void backward_range(const BackwardProblem& problem, int64_t first_task,
                              int64_t last_task) {
  const Sizes& sizes = problem.sizes;
  const Heads<Real> heads{problem.storage, sizes.heads, sizes.channels};
  const int64_t numbers = sizes.tokens * sizes.channels;
  const Points<Real> points(sizes);
  const Scratch<Real> row(sizes.channels), scratch(numbers);
  const Rows<Real> grad_value{scratch.data(), sizes.channels};
  HeadValue<Real> value(problem.storage, sizes, problem.value);
  for (int64_t task = first_task; task < last_task; ++task) {
    const int64_t image = task / sizes.heads, head = task % sizes.heads;
    std::memset(grad_value.data, 0, static_cast<size_t>(numbers) * sizeof(Real));
    backward_head(problem, value(image, head), grad_value, image, head, points, row.data());
    heads.write(Rows<const Real>{grad_value.data, grad_value.stride}, sizes.tokens,
                problem.grad_value, image * sizes.tokens, head);
  }
}

// One query and level of `finish_fused_backward`.
template <class Real>
void finish_level(const BackwardProblem& problem, int64_t query, int64_t level) {
  const Sizes& sizes = problem.sizes;
  const int64_t size = problem.sampling.reference_size;
  const int64_t place = (query * sizes.levels + level) * size;
  const Real* reference = static_cast<const Real*>(problem.sampling.reference) + place;
  const Real points = static_cast<Real>(sizes.points);
  const Real scale_x = size == 4 ? offset_scale(reference[2], points)
                                 : offset_scale(static_cast<Real>(sizes.level[level].width));
  const Real scale_y = size == 4 ? offset_scale(reference[3], points)
                                 : offset_scale(static_cast<Real>(sizes.level[level].height));
  Real totals[4] = {0, 0, 0, 0};
  for (int64_t head = 0; head < sizes.heads; ++head) {
    const int64_t start = 2 * ((query * sizes.heads + head) * sizes.levels + level) * sizes.points;
    const Real* offsets = static_cast<const Real*>(problem.sampling.offsets) + start;
    Real* gradient = static_cast<Real*>(problem.grad_locations) + start;
    for (int64_t i = 0; i < 2 * sizes.points; i += 2) {
      totals[0] += gradient[i];
      totals[1] += gradient[i + 1];
      totals[2] += chained(gradient[i], offset_scale(offsets[i], points));
      totals[3] += chained(gradient[i + 1], offset_scale(offsets[i + 1], points));
      gradient[i] = chained(gradient[i], scale_x);
      gradient[i + 1] = chained(gradient[i + 1], scale_y);
    }
  }
  std::copy_n(totals, size, static_cast<Real*>(problem.grad_reference) + place);
}

template <class Real>
void finish_range(const BackwardProblem& problem, int64_t first, int64_t last) {
  for (int64_t query = first; query < last; ++query) {
    for (int64_t level = 0; level < problem.sizes.levels; ++level) {
      finish_level<Real>(problem, query, level);
    }
  }
}

// Function multi-versioning does not reach into templates, hence plain functions. Double precision
// is for checking, not for speed: one version is enough.
ED_DISPATCHED void forward_floats(const ForwardProblem& problem, int64_t tasks, int64_t first,
                                  int64_t last) {
  forward_range<float>(problem, tasks, first, last);
}
ED_DISPATCHED void backward_floats(const BackwardProblem& problem, int64_t first, int64_t last) {
  backward_range<float>(problem, first, last);
}
void forward_doubles(const ForwardProblem& problem, int64_t tasks, int64_t first, int64_t last) {
  forward_range<double>(problem, tasks, first, last);
}
void backward_doubles(const BackwardProblem& problem, int64_t first, int64_t last) {
  backward_range<double>(problem, first, last);
}

}  // namespace

int64_t forward_tasks(const Sizes& sizes, int64_t wanted) {
  const int64_t rows = sizes.images * sizes.heads;
  if (rows == 0 || sizes.queries == 0) return 0;
  const int64_t parts = (wanted + rows - 1) / rows;
  return rows * std::clamp<int64_t>(parts, 1, sizes.queries);
}

void forward(const ForwardProblem& problem, int64_t tasks, int64_t first, int64_t last) {
  const bool doubles = problem.storage == Storage::Float64;
  (doubles ? forward_doubles : forward_floats)(problem, tasks, first, last);
}

int64_t backward_tasks(const Sizes& sizes) { return sizes.images * sizes.heads; }

void backward(const BackwardProblem& problem, int64_t first, int64_t last) {
  const bool doubles = problem.storage == Storage::Float64;
  (doubles ? backward_doubles : backward_floats)(problem, first, last);
}

int64_t finish_tasks(const Sizes& sizes) { return sizes.images * sizes.queries; }

void finish_fused_backward(const BackwardProblem& problem, int64_t first, int64_t last) {
  const bool doubles = problem.storage == Storage::Float64;
  (doubles ? finish_range<double> : finish_range<float>)(problem, first, last);
}

}  // namespace efficient_detr
