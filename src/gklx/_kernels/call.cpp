// One call: which instruction set, which passes over the rows, threads, and what the batch comes to.

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "cpu.h"
#include "row.h"

#if defined(_MSC_VER) && defined(_M_X64)
#include <intrin.h>
#endif

// --- the instruction set ---------------------------------------------------------------------------------------------

#ifdef GKLX_HAS_GENERIC
extern const Loops gklx_loops_generic;
#endif
#ifdef GKLX_HAS_NEON
extern const Loops gklx_loops_neon;
#endif
#ifdef GKLX_HAS_SSE2
extern const Loops gklx_loops_sse2;
extern const Loops gklx_loops_avx2;
extern const Loops gklx_loops_avx512;
#endif

namespace {

#if defined(GKLX_HAS_SSE2) && defined(_MSC_VER)
bool has_bits(int leaf, int reg, unsigned bits) {
  int found[4];
  __cpuidex(found, leaf, 0);
  return (unsigned(found[reg]) & bits) == bits;
}
// 1 << 27: the system saves extended registers at all; the two masks: which ones it saves.
bool saves(unsigned long long state) { return has_bits(1, 2, 1u << 27) && (_xgetbv(0) & state) == state; }
bool has_avx2() { return saves(0x6) && has_bits(1, 2, (1u << 12) | (1u << 29)) && has_bits(7, 1, 1u << 5); }
bool has_avx512() {
  return has_avx2() && saves(0xe6) && has_bits(7, 1, (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31));
}
#elif defined(GKLX_HAS_SSE2)
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// The best that the processor has, or the one that GKLX_INSTRUCTION_SET names if the processor has it.
const Loops &chosen_loops() {
  const Loops *available[3] = {};
  int found = 0;
#ifdef GKLX_HAS_SSE2
  if (has_avx512()) available[found++] = &gklx_loops_avx512;
  if (has_avx2()) available[found++] = &gklx_loops_avx2;
  available[found++] = &gklx_loops_sse2;
#endif
#ifdef GKLX_HAS_NEON
  available[found++] = &gklx_loops_neon;
#endif
#ifdef GKLX_HAS_GENERIC
  available[found++] = &gklx_loops_generic;
#endif
  const char *asked = std::getenv("GKLX_INSTRUCTION_SET");
  for (int i = 0; asked && i < found; ++i) {
    if (std::strcmp(asked, available[i]->name) == 0) return *available[i];
  }
  return *available[0];
}

const Loops &loops = chosen_loops();

// --- threads ---------------------------------------------------------------------------------------------------------

constexpr int64_t ELEMENTS_A_THREAD = 1 << 16, ELEMENTS_A_PIECE = 1 << 14;

struct Free {
  void operator()(void *memory) const { std::free(memory); }
};

// `work(begin, end, scratch)` for all of [0, n), in pieces that whichever thread is free takes. Where the caller's library
// has threads, these are used: they wait for work in a busy loop, and other threads would have to share the cores with
// them. Otherwise threads are started for the call: none is left behind that a fork would lose.
template <class Work> void in_parallel(const gklx_call &call, int64_t n, Work work) {
  int64_t threads = n * call.classes / ELEMENTS_A_THREAD;
  threads = threads > call.threads ? call.threads : threads;
  threads = threads < 1 ? 1 : threads;
  const int64_t classes = call.classes > 0 ? call.classes : 1;
  const int64_t piece = ELEMENTS_A_PIECE > classes ? ELEMENTS_A_PIECE / classes : 1;
  const size_t bytes = (loops.scratch_bytes(call) + 63) / 64 * 64;
  std::unique_ptr<char, Free> memory((char *)std::malloc(bytes * size_t(threads) + 64));
  if (!memory) throw std::bad_alloc();
  char *aligned = memory.get() + (64 - uintptr_t(memory.get()) % 64);
  std::atomic<int64_t> next(0);
  auto take = [&](int64_t thread) {
    for (int64_t begin; (begin = next.fetch_add(piece)) < n;) {
      work(begin, begin + piece < n ? begin + piece : n, aligned + bytes * size_t(thread));
    }
  };
  using Take = decltype(take);
  auto take_all = [](int64_t begin, int64_t end, void *context) {
    for (int64_t thread = begin; thread < end; ++thread) (*(Take *)context)(thread);
  };
  if (threads > 1 && call.parallel_for && call.parallel_for(0, threads, 1, take_all, &take) == 0) return;
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < threads; ++i) others.emplace_back(take, i);
  } catch (const std::exception &) {  // no more threads, or no memory for them: those that run do the work
  }
  take(0);
  for (std::thread &other : others) other.join();
}

// --- a batch ---------------------------------------------------------------------------------------------------------

double real_at(const gklx_call &c, const void *array, int64_t i) {
  return in_double(c) ? ((const double *)array)[i] : double(((const float *)array)[i]);
}

void set_real(const gklx_call &c, void *array, int64_t i, double x) {
  if (in_double(c)) ((double *)array)[i] = x;
  else ((float *)array)[i] = float(x);
}

bool needs_squared_mass(const gklx_call &c) { return c.decomposed && c.batch_normalized && c.mse_weight != 0; }

double sample_weight(const gklx_call &c, int64_t row) {
  double v = c.sample_weight ? real_at(c, c.sample_weight, row) : 1;
  return v < 0 ? NAN : v;
}

// The scales V and P, as the formulas find them in the type of the call.
double weight_scale(const gklx_call &c, double largest) {
  return in_double(c) ? power_of_two_below(largest) : double(power_of_two_below(float(largest)));
}
double base_scale(const gklx_call &c, double largest) {
  return in_double(c) ? invertible(largest) : double(invertible(float(largest)));
}

// (base / P)^gamma, to which the row's mass is relative.
double base_power(const gklx_call &c, double base) {
  return power_of_base(base, in_double(c) ? c.gamma : double(float(c.gamma)));
}

Totals<double> totals_of(const gklx_call &c, const std::vector<Row> &rows) {
  double largest_weight = 0, largest_base = 0;
  for (const Row &row : rows) {
    if (row.weight > largest_weight) largest_weight = row.weight;
    if (row.weight != 0 && row.base > largest_base) largest_base = row.base;
  }
  const bool squares = needs_squared_mass(c);
  Totals<double> totals = {weight_scale(c, largest_weight), squares ? base_scale(c, largest_base) : 1, 0, 0};
  for (const Row &row : rows) {
    if (row.weight == 0) continue;
    const double v = row.weight / totals.largest_weight;
    totals.weight += v;
    if (!squares) continue;
    const double mass = row.mass * base_power(c, row.base / totals.largest_base);
    totals.squared_mass += v * (mass * mass);
  }
  return totals;
}

bool same(const Totals<double> &a, const Totals<double> &b) { return std::memcmp(&a, &b, sizeof a) == 0; }

// A row's loss, not yet multiplied by its share.
double loss_of(const gklx_call &c, const Row &row, const Totals<double> &totals) {
  if (!c.decomposed) return row.loss_kl;
  double loss = 0;
  if (c.mse_weight != 0) {
    const double base = c.batch_normalized ? row.base / totals.largest_base : row.base;
    const double factor = mass_factor(row.mass, base_power(c, base), c.batch_normalized, totals);
    loss += scaled(c.mse_weight * factor, row.loss_mse);
  }
  return loss + scaled(c.ce_weight, row.loss_ce);
}

void write_value(const gklx_call &c, const std::vector<Row> &rows, const Totals<double> &totals) {
  double value = 0;
  for (int64_t i = 0; i < c.rows; ++i) {
    const double share = reduction_weight(rows[i].weight, c.reduction == MEAN, c.ranks, totals);
    const double entry = scaled(share, loss_of(c, rows[i], totals));
    if (c.reduction == NONE) set_real(c, c.value, i, entry);
    value += entry;
  }
  if (c.reduction != NONE) set_real(c, c.value, 0, value);
}

// The prior's rows that are used, once each, and which row of logits uses which.
class PriorRows {
 public:
  // For rows that several samples use, or whose W the gradients need before any row of logits is read.
  PriorRows(const gklx_call &c, const Pass &pass) {
    of_row_.resize(size_t(c.rows));
    if (c.labels) {
      std::vector<int64_t> number(size_t(c.classes), -1);
      for (int64_t i = 0; i < c.rows; ++i) {
        const int64_t label = c.labels[i];
        of_row_[i] = -1;
        if (label < 0 || label >= c.classes) continue;
        if (number[label] < 0) {
          number[label] = int64_t(source_.size());
          source_.push_back(label);
        }
        of_row_[i] = number[label];
      }
    } else {
      for (int64_t i = 0; i < c.rows; ++i) {
        of_row_[i] = i;
        source_.push_back(i);
      }
    }
    const size_t n = source_.size();
    numbers_.resize(4 * n);
    const bool stored = c.gamma != 1 || c.prior_type != (in_double(c) ? F64 : F32);
    if (stored) {
      weights_.reset((char *)std::malloc(n * size_t(c.classes) * (in_double(c) ? 8 : 4) + 1));
      if (!weights_) throw std::bad_alloc();
    }
    double *numbers = numbers_.data();
    powered_ = {weights_.get(), numbers, numbers + n, numbers + 2 * n, numbers + 3 * n, source_.data(), of_row_.data()};
    Pass powering = pass;
    powering.powered = &powered_;
    in_parallel(c, int64_t(n),
                [&](int64_t begin, int64_t end, void *scratch) { loops.power_prior(powering, begin, end, scratch); });
  }

  const PoweredPrior *powered() const { return &powered_; }

 private:
  std::vector<int64_t> of_row_, source_;
  std::vector<double> numbers_;
  std::unique_ptr<char, Free> weights_;
  PoweredPrior powered_;
};

void run_pass(const Pass &pass) {
  in_parallel(*pass.call, pass.call->rows,
              [&](int64_t begin, int64_t end, void *scratch) { loops.run(pass, begin, end, scratch); });
}

// What the rows come to if all their classes are valid and their softmaxes defined: known without a pass over them. Where
// that turns out to be wrong, `run_call` makes the gradients again.
void assume_all_valid(const Pass &pass) {
  const gklx_call &c = *pass.call;
  for (int64_t i = 0; i < c.rows; ++i) {
    Row &row = pass.rows[i];
    row = {sample_weight(c, i), 1, 1};
    if (pass.weights == TEACHER_POWER && c.gamma == 0) row.mass = double(c.classes);
    if (pass.weights != PRIOR_POWER || !pass.powered) continue;
    const int64_t at = pass.powered->of_row[i];
    row.mass = at < 0 ? NAN : pass.powered->mass[at];
    row.base = at < 0 ? 1 : pass.powered->base[at];
  }
}

void run_call(const gklx_call &c) {
  std::vector<Row> rows((size_t(c.rows)));
  Pass pass = {};
  pass.call = &c;
  pass.rows = rows.data();
  const bool value = c.value != nullptr, gradients = c.to_student || c.to_teacher;
  pass.reverse = c.reverse_kl != nullptr;
  pass.kl = c.kl || (value && !c.decomposed);
  pass.mse = c.mse || (value && c.decomposed && c.mse_weight != 0);
  pass.ce = c.ce || (value && c.decomposed && c.ce_weight != 0);
  const double temperature = in_double(c) ? c.temperature : double(float(c.temperature));
  const double weight_temperature = in_double(c) ? c.weight_temperature : double(float(c.weight_temperature));
  if (!c.decomposed && gradients) pass.weights = PROBABILITIES;
  else if (c.prior) pass.weights = PRIOR_POWER;
  else pass.weights = c.gamma == 1 && temperature == weight_temperature ? PROBABILITIES : TEACHER_POWER;

  const bool squares = needs_squared_mass(c);
  Totals<double> totals = {1, 1, 0, 0};
  if (c.totals) totals = {c.totals[0], c.totals[1], c.totals[2], c.totals[3]};
  const bool assumes = gradients && !c.totals && (c.reduction == MEAN || squares);
  // W is 1 where the weights are probabilities; otherwise it may depend on masks or on the teacher's logits.
  const bool of_probabilities = pass.weights == PROBABILITIES || (pass.weights == TEACHER_POWER && c.gamma == 1);
  const bool needs_pass = assumes && squares && !of_probabilities &&
                          (c.where || (pass.weights == TEACHER_POWER && c.gamma != 0));

  std::unique_ptr<PriorRows> prior;
  if (pass.weights == PRIOR_POWER && (c.labels || (assumes && squares && !needs_pass))) {
    prior = std::make_unique<PriorRows>(c, pass);
    pass.powered = prior->powered();
  }
  pass.totals = &totals;
  if (assumes) {
    if (needs_pass) {
      Pass masses = pass;
      masses.kl = masses.mse = masses.ce = masses.reverse = false;
      run_pass(masses);
      pass.masses_known = true;
    } else {
      assume_all_valid(pass);
    }
    totals = totals_of(c, rows);
  }
  pass.to_student = c.to_student != nullptr;
  pass.to_teacher = c.to_teacher != nullptr;
  run_pass(pass);
  if (!c.totals) {
    const Totals<double> found = totals_of(c, rows);
    const bool wrong = assumes && !same(found, totals);
    totals = found;
    if (wrong) run_pass(pass);
  }
  if (value) write_value(c, rows, totals);
  if (c.totals_out) {
    const double numbers[4] = {totals.largest_weight, totals.largest_base, totals.weight, totals.squared_mass};
    std::memcpy(c.totals_out, numbers, sizeof numbers);
  }
}

}  // namespace

int gklx_rows(const gklx_call *call) {
  try {
    run_call(*call);
  } catch (const std::bad_alloc &) {
    return 1;
  }
  return 0;
}

int gklx_check_prior(const gklx_call *call) {
  const gklx_call &c = *call;
  for (int64_t i = 0; c.labels && i < c.rows; ++i) {
    if (c.labels[i] < 0 || c.labels[i] >= c.classes) return 2;
  }
  // Of a table with more rows than there are samples, those that are used.
  const bool chosen = c.labels && c.rows < c.classes;
  const int64_t rows = c.labels && !chosen ? c.classes : c.rows;
  std::atomic<bool> right(true);
  const auto check = [&](int64_t begin, int64_t end, void *) {
    for (int64_t row = begin; row < end; ++row) {
      if (!loops.are_weights(c.prior, c.prior_type, chosen ? c.labels[row] : row, c.classes)) right = false;
    }
  };
  try {
    in_parallel(c, rows, check);
  } catch (const std::bad_alloc &) {
    return 1;
  }
  return right ? 0 : 2;
}

const char *gklx_instruction_set() { return loops.name; }

int gklx_call_bytes() { return int(sizeof(gklx_call)); }
