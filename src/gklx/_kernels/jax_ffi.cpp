// The row kernel as a handler of jax.ffi.
//
// Operands: student, teacher, the five hyper-parameters [5] in the dtype computed in (temperature, weight temperature,
// gamma, wMSE weight, CE weight), then those of `Present` that the attribute `present` names, in that order. The last
// axis of the logits is the classes; the leading ones, any number of them, are the rows. `where` has the logits' shape.
// Results: those of `Asked` that the attribute `asked` names, in that order.
#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <string>

#include "cpu.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

enum Present : int32_t { PRIOR = 1, LABELS = 2, SAMPLE_WEIGHT = 4, WHERE = 8, UPSTREAM = 16 };
enum Asked : int32_t { VALUE = 1, STUDENT_GRADIENT = 2, TEACHER_GRADIENT = 4 };

constexpr int32_t NOT_FLOATING = -1;

int32_t floating_type(const ffi::AnyBuffer& buffer) {
  switch (buffer.element_type()) {
    case ffi::DataType::F32: return F32;
    case ffi::DataType::F64: return F64;
    case ffi::DataType::F16: return F16;
    case ffi::DataType::BF16: return BF16;
    default: return NOT_FLOATING;
  }
}

int64_t size(const ffi::AnyBuffer& buffer) { return static_cast<int64_t>(buffer.element_count()); }

ffi::Error unexpected(const std::string& name) {
  return ffi::Error::InvalidArgument("gklx: " + name + " has another shape or dtype than the kernel expects");
}

ffi::Error out_of_memory() { return ffi::Error(ffi::ErrorCode::kResourceExhausted, "gklx: out of memory"); }

// The call of the kernel that the operands and results make.
struct Request {
  gklx_call call{};
  ffi::DataType real = ffi::DataType::F32;  // the dtype computed in
  std::unique_ptr<int64_t[]> copied_labels;

  bool holds(const ffi::AnyBuffer& buffer, int64_t count, ffi::DataType type) const {
    return size(buffer) == count && buffer.element_type() == type;
  }

  ffi::Error set_logits(const ffi::AnyBuffer& student, const ffi::AnyBuffer& teacher) {
    const auto shape = student.dimensions();
    call.student_type = floating_type(student);
    call.teacher_type = floating_type(teacher);
    if (shape.size() == 0 || shape.back() < 1 || call.student_type == NOT_FLOATING) return unexpected("student");
    if (size(teacher) != size(student) || call.teacher_type == NOT_FLOATING) return unexpected("teacher");
    call.student = student.untyped_data();
    call.teacher = teacher.untyped_data();
    call.classes = shape.back();
    call.rows = size(student) / call.classes;
    if (call.student_type == F64 || call.teacher_type == F64) real = ffi::DataType::F64;
    return ffi::Error::Success();
  }

  ffi::Error set_numbers(const ffi::AnyBuffer& numbers) {
    if (!holds(numbers, 5, real)) return unexpected("the array of hyper-parameters");
    double* const fields[] = {&call.temperature, &call.weight_temperature, &call.gamma, &call.mse_weight,
                              &call.ce_weight};
    for (int i = 0; i < 5; ++i) {
      *fields[i] = real == ffi::DataType::F64 ? numbers.typed_data<double>()[i] : numbers.typed_data<float>()[i];
    }
    return ffi::Error::Success();
  }

  ffi::Error set_prior(const ffi::AnyBuffer& prior, bool by_labels) {
    call.prior_type = floating_type(prior);
    if (call.prior_type == NOT_FLOATING) return unexpected("prior");
    if (size(prior) != (by_labels ? call.classes : call.rows) * call.classes) return unexpected("prior");
    call.prior = prior.untyped_data();
    return ffi::Error::Success();
  }

  ffi::Error set_labels(const ffi::AnyBuffer& labels) {
    if (holds(labels, call.rows, ffi::DataType::S64)) {
      call.labels = labels.typed_data<int64_t>();
      return ffi::Error::Success();
    }
    if (!holds(labels, call.rows, ffi::DataType::S32)) return unexpected("labels");
    copied_labels.reset(new (std::nothrow) int64_t[call.rows + 1]);
    if (!copied_labels) return out_of_memory();
    std::copy_n(labels.typed_data<int32_t>(), call.rows, copied_labels.get());
    call.labels = copied_labels.get();
    return ffi::Error::Success();
  }

  ffi::Error set_sample_weight(const ffi::AnyBuffer& weight) {
    if (!holds(weight, call.rows, real)) return unexpected("sample_weight");
    call.sample_weight = weight.untyped_data();
    return ffi::Error::Success();
  }

  ffi::Error set_where(const ffi::AnyBuffer& where) {
    if (!holds(where, call.rows * call.classes, ffi::DataType::PRED)) return unexpected("where");
    call.where = static_cast<const uint8_t*>(where.untyped_data());
    call.where_row_stride = call.classes;
    call.where_class_stride = 1;
    return ffi::Error::Success();
  }

  // One number, or one a row.
  ffi::Error set_upstream(const ffi::AnyBuffer& upstream) {
    call.upstream_per_row = upstream.dimensions().size() > 0;
    if (!holds(upstream, call.upstream_per_row ? call.rows : 1, real)) return unexpected("upstream");
    call.upstream = upstream.untyped_data();
    return ffi::Error::Success();
  }

  ffi::Error set_operand(Present which, const ffi::AnyBuffer& operand, int32_t present) {
    switch (which) {
      case PRIOR: return set_prior(operand, present & LABELS);
      case LABELS: return set_labels(operand);
      case SAMPLE_WEIGHT: return set_sample_weight(operand);
      case WHERE: return set_where(operand);
      case UPSTREAM: return set_upstream(operand);
    }
    return unexpected("an operand");
  }

  ffi::Error set_result(Asked which, const ffi::AnyBuffer& result) {
    switch (which) {
      case VALUE:
        if (!holds(result, call.reduction == NONE ? call.rows : 1, real)) return unexpected("the value");
        call.value = result.untyped_data();
        break;
      case STUDENT_GRADIENT:
        if (size(result) != call.rows * call.classes || floating_type(result) != call.student_type)
          return unexpected("the student's gradient");
        call.to_student = result.untyped_data();
        break;
      case TEACHER_GRADIENT:
        if (size(result) != call.rows * call.classes || floating_type(result) != call.teacher_type)
          return unexpected("the teacher's gradient");
        call.to_teacher = result.untyped_data();
        break;
    }
    return ffi::Error::Success();
  }
};

// A loop whose parts run on XLA's threads. Its end waits only for the parts that have begun: all threads may be waiting in
// such loops themselves, and then no further part ever begins.
class Loop {
 public:
  using Work = void (*)(int64_t, int64_t, void*);

  Loop(Work work, void* context) : work_(work), context_(context) {}

  void run_part(int64_t part) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (over_) return;
      ++running_;
    }
    work_(part, part + 1, context_);
    std::lock_guard<std::mutex> lock(mutex_);
    if (--running_ == 0) idle_.notify_one();
  }

  void end() {
    std::unique_lock<std::mutex> lock(mutex_);
    over_ = true;
    idle_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  const Work work_;
  void* const context_;
  std::mutex mutex_;
  std::condition_variable idle_;
  int running_ = 0;
  bool over_ = false;
};

// Of the call that runs on this thread: the kernel hands its `parallel_for` no argument for it, since PyTorch's has none.
thread_local ffi::ThreadPool* pool_of_call = nullptr;

int32_t on_threads_of_xla(int64_t begin, int64_t end, int64_t, Loop::Work work, void* context) {
  const auto loop = std::make_shared<Loop>(work, context);
  try {
    for (int64_t part = begin + 1; part < end; ++part) pool_of_call->Schedule([loop, part] { loop->run_part(part); });
  } catch (const std::bad_alloc&) {  // the scheduled parts do the work of the others
  }
  loop->run_part(begin);
  loop->end();
  return 0;
}

ffi::Error run(ffi::ThreadPool pool, ffi::AnyBuffer student, ffi::AnyBuffer teacher, ffi::AnyBuffer numbers,
               ffi::RemainingArgs optional, ffi::RemainingRets results, int32_t present, int32_t asked,
               int32_t decomposed, int32_t tempered, int32_t symmetric, int32_t batch_normalized, int32_t reduction,
               int32_t threads) {
  Request request;
  gklx_call& call = request.call;
  call.ranks = 1;
  call.decomposed = decomposed;
  call.tempered = tempered;
  call.symmetric = symmetric;
  call.batch_normalized = batch_normalized;
  call.reduction = reduction;
  call.threads = threads;
  if (ffi::Error error = request.set_logits(student, teacher); error.failure()) return error;
  if (ffi::Error error = request.set_numbers(numbers); error.failure()) return error;
  size_t next = 0;
  for (Present which : {PRIOR, LABELS, SAMPLE_WEIGHT, WHERE, UPSTREAM}) {
    if (!(present & which)) continue;
    auto operand = optional.get<ffi::AnyBuffer>(next++);
    if (operand.has_error()) return operand.error();
    if (ffi::Error error = request.set_operand(which, *operand, present); error.failure()) return error;
  }
  next = 0;
  for (Asked which : {VALUE, STUDENT_GRADIENT, TEACHER_GRADIENT}) {
    if (!(asked & which)) continue;
    auto result = results.get<ffi::AnyBuffer>(next++);
    if (result.has_error()) return result.error();
    if (ffi::Error error = request.set_result(which, **result); error.failure()) return error;
  }
  pool_of_call = &pool;
  call.parallel_for = on_threads_of_xla;
  return gklx_rows(&call) == 0 ? ffi::Error::Success() : out_of_memory();
}

}  // namespace

GKLX_PUBLIC XLA_FFI_Error* gklx_jax_rows(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(gklx_jax_rows, run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int32_t>("present")
                                  .Attr<int32_t>("asked")
                                  .Attr<int32_t>("decomposed")
                                  .Attr<int32_t>("tempered")
                                  .Attr<int32_t>("symmetric")
                                  .Attr<int32_t>("batch_normalized")
                                  .Attr<int32_t>("reduction")
                                  .Attr<int32_t>("threads"));
