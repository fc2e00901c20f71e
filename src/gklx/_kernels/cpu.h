// What the library offers, and what its parts share: call.cpp runs a call, cpu.cpp works on rows, overlap.cpp finds the
// largest logits of a row.

#pragma once

#include <cstddef>
#include <cstdint>

#ifdef _WIN32
#define GKLX_PUBLIC extern "C" __declspec(dllexport)
#else
#define GKLX_PUBLIC extern "C" __attribute__((visibility("default")))
#endif

// Stands before a loop that the compiler may vectorise.
#if defined(_MSC_VER)
#define SIMD(...) __pragma(omp simd __VA_ARGS__)
#else
#define PRAGMA(x) _Pragma(#x)
#define SIMD(...) PRAGMA(omp simd __VA_ARGS__)
#endif

// The types of arrays. REAL is what is computed in: double where either network's logits are, else float.
enum { F32, F64, F16, BF16 };
enum { MEAN, SUM, NONE };

typedef struct {
  const void *student, *teacher;  // [rows, classes], contiguous, as is `prior`
  const void *prior;              // null; [classes, classes] with labels, else [rows, classes]
  const int64_t *labels;          // null; [rows]
  const void *sample_weight;      // null; [rows], REAL
  const uint8_t *where;           // null; booleans, with the two strides below, 0 where broadcast
  const void *upstream;           // null = 1; REAL; one number or [rows]
  const double *totals;           // null: made here; else four numbers of the batch, see `Totals` in row.h
  int64_t rows, classes, where_row_stride, where_class_stride;
  double temperature, weight_temperature, gamma, mse_weight, ce_weight, ranks;
  int32_t student_type, teacher_type, prior_type;
  int32_t decomposed, tempered, symmetric, batch_normalized;
  int32_t reduction;
  int32_t upstream_per_row, threads;
  // Null; else a loop on the threads of the library whose arrays these are. It calls `work` on parts of [begin, end), each
  // of at least `grain`, and returns 0; with another status it has done nothing. It may leave out any part but the first:
  // the kernel's parts take pieces of the work until there are none left.
  int32_t (*parallel_for)(int64_t begin, int64_t end, int64_t grain, void (*work)(int64_t, int64_t, void *), void *context);
  // Results, null where not asked for.
  void *value;                    // REAL: one number, or [rows] under NONE
  void *to_student, *to_teacher;  // of the logits' own types
  double *totals_out;             // four numbers
  // Of each sample, neither weighted nor normalised, REAL [rows]: W is the mass, a peak the largest probability at T.
  void *kl, *mse, *ce, *mass, *student_peak, *teacher_peak, *reverse_kl;
  uint8_t *has_valid, *undefined;
  int64_t *student_class, *teacher_class;  // [rows]: of the largest logit, whatever is masked; see `top_class`
  const int64_t *top_k;  // [top_ks], each in [1, classes], the largest last
  int64_t top_ks;
  int32_t *overlaps;     // [rows, top_ks]: how many classes are among the k largest of both networks, whatever is masked
} gklx_call;

GKLX_PUBLIC int gklx_rows(const gklx_call *call);  // 0: done; 1: out of memory
// Whether all labels name classes, and the prior's rows that the call may use are finite and not negative. 0: yes; 1: out
// of memory; 2: no. Reads `prior`, its type, `labels`, the sizes and the threads.
GKLX_PUBLIC int gklx_check_prior(const gklx_call *call);
GKLX_PUBLIC const char *gklx_instruction_set(void);
GKLX_PUBLIC int gklx_call_bytes(void);  // the size of the structure, by which a library of another version is known

// --- within the library ----------------------------------------------------------------------------------------------

struct Row;
template <class R> struct Totals;

// Whether a call is computed in double; else in float.
static inline bool in_double(const gklx_call &c) { return c.student_type == F64 || c.teacher_type == F64; }

// Where the class weights of a row come from.
enum Weights {
  PROBABILITIES,   // p itself: the teacher's softmax at T, to the power 1
  TEACHER_POWER,   // softmax(t / weight_temperature)^gamma
  PRIOR_POWER      // prior^gamma
};

// Rows of the prior to the power gamma, relative to each one's largest: made once where several rows of logits, or
// several passes over them, use them.
struct PoweredPrior {
  void *weights;          // REAL [distinct, classes]; null where the prior's own rows can be used as they are
  double *base, *mass;    // [distinct], as in `Row`
  double *total, *largest;  // [distinct], of the weights as they lie here
  const int64_t *source;  // [distinct]: which row of the prior
  const int64_t *of_row;  // [rows]: which distinct row a row of logits uses, -1 where its label names no class
};

// One pass over the rows, and what it is to find out.
struct Pass {
  const gklx_call *call;
  Weights weights;
  bool kl, mse, ce, reverse;  // values
  bool to_student, to_teacher;
  const Totals<double> *totals;  // of the batch, for the gradients
  const PoweredPrior *powered;   // or null
  bool masses_known;             // `rows` holds each W already
  Row *rows;                     // what was found
};

// Fills `overlaps` of one row. `scratch` are four arrays, each as large as the row.
void overlaps_of(const gklx_call &call, int64_t row, const float *s, const float *t, float *const scratch[4]);
void overlaps_of(const gklx_call &call, int64_t row, const double *s, const double *t, double *const scratch[4]);

// The loops, compiled for one instruction set.
struct Loops {
  const char *name;
  size_t (*scratch_bytes)(const gklx_call &call);
  void (*run)(const Pass &pass, int64_t begin, int64_t end, void *scratch);
  void (*power_prior)(const Pass &pass, int64_t begin, int64_t end, void *scratch);  // fills `powered`, distinct rows
  bool (*are_weights)(const void *array, int32_t type, int64_t row, int64_t n);
};
