// What is done with a row: which loops run over it, by what it holds and what is asked for. Compiled once for each
// instruction set; everything is within an anonymous namespace, since a function that two of them shared by name would
// become one.

#include "cpu.h"

#include <cmath>
#include <initializer_list>

#include "arrays.h"
#include "loops.h"
#include "row.h"

namespace {

template <class R> struct Scratch {
  R *s, *t, *es, *et, *w, *raw, *to_s, *to_t;
  uint8_t *valid;

  static constexpr int arrays = 8;

  static int64_t stride(int64_t classes) { return (classes + 15) / 16 * 16; }

  static size_t bytes(int64_t classes) { return size_t(stride(classes)) * (arrays * sizeof(R) + 1); }

  Scratch(void *memory, int64_t classes) {
    R *at = (R *)memory;
    for (R **line : {&s, &t, &es, &et, &w, &raw, &to_s, &to_t}) {
      *line = at;
      at += stride(classes);
    }
    valid = (uint8_t *)at;
  }
};

template <class R> const R *compacted(const R *x, const uint8_t *valid, int64_t n, R *to) {
  int64_t m = 0;
  for (int64_t j = 0; j < n; ++j) {
    R kept = x[j];  // `x` may be `to`
    to[m] = kept;
    m += valid[j];
  }
  return to;
}

// Marks the valid classes and returns their number.
template <class R> int64_t mark_valid(const gklx_call &c, int64_t row, const R *s, const R *t, uint8_t *valid) {
  const uint8_t *where = c.where ? c.where + row * c.where_row_stride : nullptr;
  int64_t found = 0;
  for (int64_t j = 0; j < c.classes; ++j) {
    bool in = !(s[j] == -Real<R>::inf && t[j] == -Real<R>::inf) && (!where || where[j * c.where_class_stride]);
    valid[j] = in;
    found += in;
  }
  return found;
}

// What a guarded row holds.
struct Exceptions {
  bool student_nan, teacher_nan;
  bool student_rules_out, teacher_rules_out;  // -inf
};

template <class R> Exceptions exceptions_of(const R *s, const R *t, int64_t n) {
  Exceptions found = {};
  for (int64_t j = 0; j < n; ++j) {
    found.student_nan |= is_nan(s[j]);
    found.teacher_nan |= is_nan(t[j]);
    found.student_rules_out |= s[j] == -Real<R>::inf;
    found.teacher_rules_out |= t[j] == -Real<R>::inf;
  }
  return found;
}

template <class R> struct RowKernel {
  const Pass &pass;
  const gklx_call &call;
  Scratch<R> scratch;
  const R temperature, per_temperature, gamma;
  const double per_square;  // 1 / temperature^2
  const bool difference_to_student, difference_to_teacher;  // whether d's deviations reach that gradient
  const bool gap;                                           // whether q - p reaches the student's
  const bool spread;                                        // whether d's deviations are asked for

  RowKernel(const Pass &pass, void *memory)
      : pass(pass), call(*pass.call), scratch(memory, pass.call->classes), temperature(R(call.temperature)),
        per_temperature(R(1) / temperature), gamma(R(call.gamma)),
        per_square(1 / (double(temperature) * double(temperature))),
        difference_to_student(call.decomposed && call.symmetric && call.mse_weight != 0),
        difference_to_teacher(!call.decomposed || call.mse_weight != 0),
        gap(pass.to_student && (!call.decomposed || call.ce_weight != 0)),
        spread(pass.mse || (pass.to_teacher && difference_to_teacher) || (pass.to_student && difference_to_student)) {}

  void set(void *array, int64_t row, double x) const {
    if (array) ((R *)array)[row] = R(x);
  }

  // Of a row without softmaxes: NaN, but 0 in a class without weight and where a factor is 0.
  void undefined_gradients(int64_t row, const uint8_t *valid, int64_t n, const R *w, const Row &found) {
    if (!pass.to_student && !pass.to_teacher) return;
    const R nan = nan_of<R>();
    const GradientScales<R> scales = scales_of(row, found, 1);
    const R of_gap = scaled(scales.gap, nan);
    for (int64_t j = 0; j < n; ++j) {
      const R difference = scaled(scales.difference, w && w[j] == 0 && !is_nan(found.mass) ? R(0) : nan);
      scratch.to_s[j] = difference_to_student ? of_gap - difference : of_gap;
      scratch.to_t[j] = difference;
    }
    if (pass.to_student) scatter_gradient(scratch.to_s, call.to_student, call.student_type, row, valid);
    if (pass.to_teacher) scatter_gradient(scratch.to_t, call.to_teacher, call.teacher_type, row, valid);
  }

  void report(int64_t row, const Row &found, bool valid, bool undefined, double s_total, double t_total) const {
    pass.rows[row] = found;
    double w = found.mass == 0 ? 0 : found.mass * power_of_base(found.base, double(gamma));
    double mse = found.loss_mse == 0 ? 0 : w * w * found.loss_mse;
    set(call.kl, row, found.loss_kl);
    set(call.reverse_kl, row, found.reverse_kl);
    set(call.mse, row, mse);
    set(call.ce, row, found.loss_ce);
    set(call.mass, row, w);
    set(call.student_peak, row, 1 / s_total);
    set(call.teacher_peak, row, 1 / t_total);
    if (call.has_valid) call.has_valid[row] = valid;
    if (call.undefined) call.undefined[row] = undefined;
  }

  void run(int64_t row) {
    const int64_t classes = call.classes;
    double weight = call.sample_weight ? double(((const R *)call.sample_weight)[row]) : 1;
    if (weight == 0) {
      if (call.student_class) call.student_class[row] = 0;
      if (call.teacher_class) call.teacher_class[row] = 0;
      for (int64_t i = 0; call.overlaps && i < call.top_ks; ++i) call.overlaps[row * call.top_ks + i] = 0;
      return write_excluded(row);
    }
    if (weight < 0) weight = double(nan_of<R>());
    RowData<R> x;
    x.n = classes;
    x.student_ahead = ahead(call.student, call.student_type, row);
    x.teacher_ahead = ahead(call.teacher, call.teacher_type, row);
    x.s = widened(call.student, call.student_type, row, classes, scratch.s);
    x.t = widened(call.teacher, call.teacher_type, row, classes, scratch.t);
    Inspected<R> seen = inspect(x.s, x.t, classes);
    if (call.student_class) call.student_class[row] = top_class(x.s, classes, seen.s_top, seen.bounded);
    if (call.teacher_class) call.teacher_class[row] = top_class(x.t, classes, seen.t_top, seen.bounded);
    if (call.overlaps) {
      R *const free[4] = {scratch.es, scratch.et, scratch.w, scratch.raw};
      overlaps_of(call, row, x.s, x.t, free);
    }
    const uint8_t *valid = nullptr;
    if (call.where || !seen.bounded) {
      x.n = mark_valid(call, row, x.s, x.t, scratch.valid);
      if (x.n == 0) return write_excluded(row);
      if (x.n < classes) {
        valid = scratch.valid;
        x.s = compacted(x.s, valid, classes, scratch.s);
        x.t = compacted(x.t, valid, classes, scratch.t);
        seen = inspect(x.s, x.t, x.n);
      }
    }
    x.s_top = seen.s_top;
    x.t_top = seen.t_top;
    x.per_temperature = per_temperature;
    if (seen.bounded) return evaluate_row<false>(row, weight, valid, x, {});
    evaluate_row<true>(row, weight, valid, x, exceptions_of(x.s, x.t, x.n));
  }

  Ahead ahead(const void *logits, int32_t type, int64_t row) const {
    constexpr int64_t longest = 8192;
    const bool fetches = row + 1 < call.rows && call.classes <= longest;
    return {fetches ? (const char *)logits + (row + 1) * call.classes * bytes_of(type) : nullptr, bytes_of(type)};
  }

  void write_excluded(int64_t row) {
    report(row, {}, false, false, 1, 1);
    for (int side = 0; side < 2; ++side) {
      if (!(side ? pass.to_teacher : pass.to_student)) continue;
      int64_t size = call.classes * bytes_of(side ? call.teacher_type : call.student_type);
      std::memset((char *)(side ? call.to_teacher : call.to_student) + row * size, 0, size_t(size));
    }
  }

  template <bool Guarded>
  void evaluate_row(int64_t row, double weight, const uint8_t *valid, RowData<R> &x, Exceptions exceptions) {
    const bool student_defined = !exceptions.student_nan && !is_infinite(x.s_top);
    const bool teacher_defined = !exceptions.teacher_nan && !is_infinite(x.t_top);
    const double nan = double(nan_of<R>());
    Row found = {weight, 1, 1};
    Weighing<R> weighing = weights_of(row, valid, x, teacher_defined);
    found.mass = pass.masses_known ? pass.rows[row].mass : weighing.mass;
    found.base = pass.masses_known ? pass.rows[row].base : weighing.base;
    if (!student_defined || !teacher_defined) {
      found.loss_kl = found.loss_mse = found.loss_ce = found.reverse_kl = nan;
      report(row, found, true, true, nan, nan);
      if (!weighing.w && teacher_defined) {
        weighing = teacher_power<R, false>(x.t, x.t_top, x.n, R(1), x.per_temperature, scratch.w);
      }
      return undefined_gradients(row, valid, x.n, weighing.w, found);
    }
    x.w = weighing.w;
    x.w_total = weighing.total;
    const bool to_s_in_place = pass.to_student && !valid && call.student_type == type_of<R>;
    const bool to_t_in_place = pass.to_teacher && !valid && call.teacher_type == type_of<R>;
    R *to_s = to_s_in_place ? (R *)call.to_student + row * call.classes : scratch.to_s;
    R *to_t = to_t_in_place ? (R *)call.to_teacher + row * call.classes : scratch.to_t;
    x.es = pass.to_student ? to_s : scratch.es;  // the gradients take the place of what they are made of
    x.et = pass.to_teacher ? to_t : scratch.et;
    softmaxes<Guarded>(x, weighing.largest);
    const Sums of_row = sums_of<Guarded>(x);
    const int infinite = Guarded && spread ? infinite_differences(x) : 0;
    find_losses<Guarded>(x, of_row, exceptions.student_rules_out, infinite != 0, found);
    if (pass.reverse) found.reverse_kl = exceptions.teacher_rules_out ? double(Real<R>::inf) : of_row.reverse_kl;
    report(row, found, true, false, x.s_total, x.t_total);
    if (!pass.to_student && !pass.to_teacher) return;
    const GradientScales<R> scales = scales_of(row, found, difference_scale<Guarded> / (x.w_total == 0 ? 1 : x.w_total));
    if ((infinite && scales.difference != 0) || is_infinite(scales.difference) || is_infinite(scales.gap)) {
      unbounded_gradients<Guarded>(x, infinite, scales, R(of_row.gap), to_s, to_t);
    } else {
      find_gradients<Guarded>(x, scales, R(of_row.gap), to_s, to_t);
    }
    if (pass.to_student) scatter_gradient(to_s, call.to_student, call.student_type, row, valid);
    if (pass.to_teacher) scatter_gradient(to_t, call.to_teacher, call.teacher_type, row, valid);
  }

  template <bool Guarded> void softmaxes(RowData<R> &x, R largest_weight) const {
    x.mean = 0;
    x.s_reference = x.s_top;
    x.t_reference = x.t_top;
    x.s_total = x.t_total = 1;
    x.of_s = x.of_t = 1;
    const bool own = !x.w;
    if ((own && spread) || needs_softmax()) {
      if (temperature == R(1)) {
        if (own || !spread) exponentials<R, Guarded, false, false>(x);
        else exponentials<R, Guarded, false, true>(x, largest_weight);
      } else {
        if (own || !spread) exponentials<R, Guarded, true, false>(x);
        else exponentials<R, Guarded, true, true>(x, largest_weight);
      }
    }
    if (own) {  // the teacher's own softmax weighs most at its top; of several tops any one does
      x.w = x.et;
      x.w_total = x.t_total;
      if (spread) x.s_reference = x.s[top_class(x.t, x.n, x.t_top, true)];
    } else if (!needs_softmax() && spread && x.w_total > 0) {
      find_reference(x, largest_weight);
    }
    if (Guarded && is_infinite(x.t_reference - x.s_reference)) {  // so is the mean of d, which is not summed then
      x.s_reference = x.s_top;
      x.t_reference = x.t_top;
    }
  }

  template <bool Guarded>
  void find_losses(const RowData<R> &x, const Sums &of_row, bool unreachable, bool infinite, Row &found) const {
    constexpr double inf = double(Real<R>::inf), scale = difference_scale<Guarded> * difference_scale<Guarded>;
    if (pass.kl) found.loss_kl = unreachable ? inf : of_row.kl;
    if (pass.ce) {
      const double mean = x.z_student / x.t_total / summed_part<Guarded> * double(x.per_temperature);
      found.loss_ce = unreachable ? inf : std::log(x.s_total) - mean;
    }
    if (pass.mse) {
      found.loss_mse = x.w_total == 0 ? 0 : of_row.squares / x.w_total * (0.5 * scale / summed_part<Guarded>);
      if (call.tempered) found.loss_mse /= double(temperature) * double(temperature);
      if (infinite) found.loss_mse = inf;
      if (is_nan(found.mass)) found.loss_mse = found.mass;
    }
  }

  template <bool Guarded>
  void find_gradients(const RowData<R> &x, GradientScales<R> scales, R gap_sum, R *to_s, R *to_t) const {
    const bool to_teacher = pass.to_teacher && difference_to_teacher;
    if (pass.to_student && difference_to_student) {
      if (to_teacher) gradients<R, Guarded, GAP_AND_DIFFERENCE, true>(x, scales, gap_sum, to_s, to_t);
      else gradients<R, Guarded, GAP_AND_DIFFERENCE, false>(x, scales, gap_sum, to_s, to_t);
    } else if (pass.to_student) {
      if (to_teacher) gradients<R, Guarded, GAP, true>(x, scales, gap_sum, to_s, to_t);
      else gradients<R, Guarded, GAP, false>(x, scales, gap_sum, to_s, to_t);
    } else if (to_teacher) {
      gradients<R, Guarded, NOT, true>(x, scales, gap_sum, to_s, to_t);
    }
    if (!pass.to_teacher || to_teacher) return;
    for (int64_t j = 0; j < x.n; ++j) to_t[j] = 0;
  }

  bool needs_softmax() const {
    return pass.kl || pass.ce || pass.reverse || pass.to_student || pass.to_teacher || call.student_peak || call.teacher_peak;
  }

  // The gradients of a row's valid classes, to their places in the result.
  void scatter_gradient(R *line, void *array, int32_t type, int64_t row, const uint8_t *valid) {
    if (valid) {
      int64_t m = 0;
      for (int64_t j = 0; j < call.classes; ++j) m += valid[j];
      for (int64_t j = call.classes - 1; j >= 0; --j) line[j] = valid[j] ? line[--m] : R(0);
    }
    narrow(line, array, type, row, call.classes);
  }

  // No weights (null) are those of the teacher's probabilities, which are not made yet.
  Weighing<R> weights_of(int64_t row, const uint8_t *valid, const RowData<R> &x, bool teacher_defined) {
    const double nan = double(nan_of<R>());
    if (pass.weights == PROBABILITIES) return {nullptr, 0, teacher_defined ? 1 : nan, 1, R(1)};
    if (pass.weights == TEACHER_POWER) {
      if (!teacher_defined) return {nullptr, 0, nan, 1, R(1)};
      const R per_tau = R(1) / R(call.weight_temperature);
      const bool needs_normalizer = !pass.masses_known && gamma != 0 && gamma != 1;
      if (needs_normalizer) return teacher_power<R, true>(x.t, x.t_top, x.n, gamma, per_tau, scratch.w);
      Weighing<R> found = teacher_power<R, false>(x.t, x.t_top, x.n, gamma, per_tau, scratch.w);
      if (gamma == 1) found.mass = 1;  // the weights are then probabilities
      return found;
    }
    int64_t source = row;
    if (const PoweredPrior *powered = pass.powered) {
      const int64_t at = powered->of_row[row];
      if (at < 0) return {nullptr, 0, nan, 1, R(1)};
      source = powered->source[at];
      if (!valid) {
        const R *w = (const R *)call.prior + source * call.classes;
        if (powered->weights) w = (const R *)powered->weights + at * call.classes;
        if (powered->weights || usable_unscaled(powered->base[at])) {
          return {w, powered->total[at], powered->mass[at], powered->base[at], R(powered->largest[at])};
        }
      }
    }
    const R *prior = widened(call.prior, call.prior_type, source, call.classes, scratch.raw);
    if (valid) prior = compacted(prior, valid, call.classes, scratch.raw);
    return prior_power(prior, x.n, gamma, scratch.w);
  }

  template <bool Guarded, bool Spread> Sums sums_for(const RowData<R> &x) const {
    if (pass.reverse) {
      return gap ? sums<R, Guarded, Spread, true, true, true>(x) : sums<R, Guarded, Spread, false, true, true>(x);
    }
    if (pass.kl) return gap ? sums<R, Guarded, Spread, true, true>(x) : sums<R, Guarded, Spread, false, true>(x);
    if (gap) return sums<R, Guarded, Spread, true, false>(x);
    return Spread ? sums<R, Guarded, Spread, false, false>(x) : Sums{};
  }

  template <bool Guarded> Sums sums_of(RowData<R> &x) const {
    if (!spread) return sums_for<Guarded, false>(x);
    Sums found = sums_for<Guarded, true>(x);
    if (x.w_total == 0) return found;
    const double mean = found.moment / x.w_total / summed_part<Guarded>, off = found.moment * mean;
    x.mean = R(mean);
    // The squares about the reference are too large by `off`: where that is most of them, they are summed again.
    if (pass.mse && (!(4 * off <= 3 * found.squares) || is_infinite(off))) {
      found.squares = sums<R, Guarded, true, false, false>(x).squares;
    } else {
      found.squares -= off;
    }
    return found;
  }

  // 1: some d of weight is +inf, 2: some is -inf; their sum where both.
  int infinite_differences(const RowData<R> &x) const {
    int found = 0;
    for (int64_t j = 0; j < x.n; ++j) {
      const R d = R(0.25) * x.t[j] - R(0.25) * x.s[j];
      if (is_infinite(d) && x.w[j] > 0) found |= d > 0 ? 1 : 2;
    }
    return found;
  }

  // Of a row in which differences of weight are infinite: their mean is, too, and between opposite ones there is none.
  // Or of one whose factor is beyond the largest number: what it multiplies may be 0.
  template <bool Guarded>
  void unbounded_gradients(const RowData<R> &x, int infinite, GradientScales<R> scales, R gap_sum, R *to_s, R *to_t) const {
    constexpr R inf = Real<R>::inf;
    const R others = infinite == 1 ? -inf : infinite == 2 ? inf : nan_of<R>();
    const Difference<R> reference = difference_at<R, Guarded>(x.t_reference, x.s_reference);
    for (int64_t j = 0; j < x.n; ++j) {
      const Difference<R> d = difference_at<R, Guarded>(x.t[j], x.s[j]);
      R c = is_infinite(d.high) ? d.high : others;
      if (!infinite) c = ((d.high - reference.high) + (d.low - reference.low)) - x.mean;
      const R weighted = x.w[j] == 0 ? R(0) : infinite ? c : x.w[j] * c;
      const R of_difference = scaled(scales.difference, weighted);
      const R p = x.et[j] * x.of_t, q = x.es[j] * x.of_s;
      if (pass.to_student) {
        const R of_gap = scaled(scales.gap, (q - p) - p * gap_sum);
        to_s[j] = difference_to_student ? of_gap - of_difference : of_gap;
      }
      if (pass.to_teacher) to_t[j] = difference_to_teacher ? of_difference : R(0);
    }
  }

  GradientScales<R> scales_of(int64_t row, const Row &found, double per_total) const {
    const Totals<double> &totals = *pass.totals;
    double share = reduction_weight(found.weight, call.reduction == MEAN, call.ranks, totals);
    if (call.upstream) share *= double(((const R *)call.upstream)[call.upstream_per_row ? row : 0]);
    if (!call.decomposed) return {R(share * per_square * per_total), R(share / double(temperature))};
    double base = found.base;
    if (call.batch_normalized) base /= totals.largest_base;
    double factor = mass_factor(found.mass, power_of_base(base, double(gamma)), call.batch_normalized, totals) * per_total;
    if (call.tempered) factor *= per_square;
    // A factor of 0 keeps what it multiplies out, be it infinite.
    double of_difference = call.mse_weight == 0 || share == 0 ? 0 : share * call.mse_weight * factor;
    double of_gap = call.ce_weight == 0 ? 0 : share * call.ce_weight / double(temperature);
    return {R(of_difference), R(of_gap)};
  }
};

template <class R> void run_rows(const Pass &pass, int64_t begin, int64_t end, void *memory) {
  RowKernel<R> kernel(pass, memory);
  for (int64_t row = begin; row < end; ++row) kernel.run(row);
}

template <class R> void power_prior_rows(const Pass &pass, int64_t begin, int64_t end, void *memory) {
  const gklx_call &c = *pass.call;
  Scratch<R> scratch(memory, c.classes);
  for (int64_t at = begin; at < end; ++at) {
    const R *raw = widened(c.prior, c.prior_type, pass.powered->source[at], c.classes, scratch.raw);
    R *kept = pass.powered->weights ? (R *)pass.powered->weights + at * c.classes : scratch.w;
    Weighing<R> found = prior_power(raw, c.classes, R(c.gamma), kept);
    if (pass.powered->weights && found.w != kept) std::memcpy(kept, found.w, size_t(c.classes) * sizeof(R));
    pass.powered->base[at] = found.base;
    pass.powered->mass[at] = found.mass;
    pass.powered->total[at] = found.total;
    pass.powered->largest[at] = double(found.largest);
  }
}

// Whether no number of a row is negative, infinite or NaN, by their bits.
template <class Word> bool are_weights_of(const void *array, int64_t row, int64_t n, Word infinity) {
  const Word *x = (const Word *)array + row * n;
  constexpr Word minus_zero = Word(Word(1) << (8 * sizeof(Word) - 1));
  Word wrong = 0;
  SIMD(reduction(| : wrong))
  for (int64_t j = 0; j < n; ++j) wrong |= x[j] < infinity || x[j] == minus_zero ? Word(0) : Word(1);
  return wrong == 0;
}

bool are_weights(const void *array, int32_t type, int64_t row, int64_t n) {
  if (type == F64) return are_weights_of<uint64_t>(array, row, n, bits_of(Real<double>::inf));
  if (type == F32) return are_weights_of<uint32_t>(array, row, n, bits_of(Real<float>::inf));
  return are_weights_of<uint16_t>(array, row, n, type == BF16 ? 0x7f80 : 0x7c00);
}

size_t scratch_bytes(const gklx_call &c) {
  return in_double(c) ? Scratch<double>::bytes(c.classes) : Scratch<float>::bytes(c.classes);
}

void run(const Pass &pass, int64_t begin, int64_t end, void *memory) {
  in_double(*pass.call) ? run_rows<double>(pass, begin, end, memory) : run_rows<float>(pass, begin, end, memory);
}

void power_prior(const Pass &pass, int64_t begin, int64_t end, void *memory) {
  if (in_double(*pass.call)) power_prior_rows<double>(pass, begin, end, memory);
  else power_prior_rows<float>(pass, begin, end, memory);
}

}  // namespace

#define JOINED(a, b) a##b
#define LOOPS_OF(set) JOINED(gklx_loops_, set)
#define TEXT(x) #x
#define NAME_OF(set) TEXT(set)

extern const Loops LOOPS_OF(GKLX_SET);
const Loops LOOPS_OF(GKLX_SET) = {NAME_OF(GKLX_SET), scratch_bytes, run, power_prior, are_weights};
