// A make-believe CUDA card for a torch that was built without CUDA. It uses the host's memory and the CPU's kernels.
//
// Everything above the kernels is torch's own code: device checks, autograd, allocation and release of memory. So a run
// behaves as on a real card, except for its time and the last bits of its results. The card also finds three errors:
// reading uninitialized memory (it contains NaN), synchronizing during the capture of a graph, and using a copy that
// has not arrived.
//
// It replaces the parts that CUDA's library has in other builds of torch: allocator, guard, hooks and kernels. A
// fallback calls each operation's CPU kernel with tensors that share the card's memory.

// With ATen.h the compilation would take twice as long.
#define TORCH_ASSERT_ONLY_METHOD_OPERATORS
#include <ATen/core/Tensor.h>
#include <torch/csrc/Generator.h>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <ATen/ops/_scaled_dot_product_flash_attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <tuple>
#include <unordered_map>

using namespace at;

namespace {

const Device CARD(DeviceType::CUDA, 0);

bool on_card(const Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == DeviceType::CUDA;
}

// -- memory ----------------------------------------------------------------------------------------------------------

// Like torch's caching allocator, it keeps freed memory reserved until the cache is emptied: for its stream, or for its
// pool if it was allocated during a capture. There is no fragmentation, because it counts bytes, not blocks.
struct Block {
  int64_t size;
  std::pair<int64_t, int64_t> bin;  // pool (0: ordinary memory) and stream
};
struct Pool {
  int64_t live = 0, graphs = 0;
};
struct Memory {
  std::recursive_mutex lock;
  std::unordered_map<void*, Block> blocks;
  std::map<std::pair<int64_t, int64_t>, int64_t> cached;
  std::map<int64_t, Pool> pools;
  std::vector<int64_t> underway;  // pools of captures that have not ended
  int64_t live = 0, peak = 0, reserved = 0, reserved_peak = 0, room = -1, stream = 0, pool = 0;
} memory;

void empty_cache() {
  TORCH_INTERNAL_ASSERT(memory.underway.empty(), "captures_underway.empty()");
  for (auto& [bin, bytes] : memory.cached) {
    if (bin.first && memory.pools[bin.first].graphs > 0) continue;
    memory.reserved -= std::exchange(bytes, 0);
  }
  for (auto it = memory.pools.begin(); it != memory.pools.end();)
    it = it->second.graphs == 0 && it->second.live == 0 ? memory.pools.erase(it) : std::next(it);
}

void release(void* place) {
  std::lock_guard<std::recursive_mutex> guard(memory.lock);
  auto found = memory.blocks.find(place);
  if (found != memory.blocks.end()) {
    const auto& [size, bin] = found->second;
    memory.live -= size;
    memory.cached[bin] += size;
    if (bin.first) memory.pools[bin.first].live -= size;
    memory.blocks.erase(found);
  }
  c10::free_cpu(place);
}

struct CardAllocator final : c10::Allocator {
  DataPtr allocate(size_t size) override {
    std::lock_guard<std::recursive_mutex> guard(memory.lock);
    const auto wanted = static_cast<int64_t>(size);
    const std::pair<int64_t, int64_t> bin(memory.pool, memory.stream);
    auto fresh = [&] { return std::max<int64_t>(wanted - memory.cached[bin], 0); };
    auto full = [&] { return memory.room >= 0 && memory.reserved + fresh() > memory.room; };
    // torch releases no cached memory during a capture.
    if (full() && memory.underway.empty()) empty_cache();
    TORCH_CHECK_WITH(
        OutOfMemoryError, !full(), "the make-believe card is full: ", memory.live, " bytes and ", wanted, " more, of ",
        memory.reserved, " reserved");
    void* place = c10::alloc_cpu(size ? size : 1);
    std::memset(place, 0xFF, size);  // NaN in every floating-point format
    memory.reserved += fresh();
    memory.reserved_peak = std::max(memory.reserved_peak, memory.reserved);
    memory.cached[bin] = std::max<int64_t>(memory.cached[bin] - wanted, 0);
    memory.blocks[place] = {wanted, bin};
    memory.live += wanted;
    if (bin.first) memory.pools[bin.first].live += wanted;
    memory.peak = std::max(memory.peak, memory.live);
    return {place, place, &release, CARD};
  }
  DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t size) const override { std::memcpy(to, from, size); }
};
CardAllocator allocator;

// -- torch's interfaces of a device ----------------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return CARD; }
  Device getDevice() const override { return CARD; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, CARD); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, CARD); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, CARD); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void recordDataPtrOnStream(const DataPtr&, const Stream&) const override {}
};

using Tape = std::vector<std::function<void()>>;
std::shared_ptr<Tape> recording;
std::vector<std::shared_ptr<Tape>> tapes;

// A generator of the card. It draws the same numbers as a CPU generator with its seed. A replay uses its present state.
struct CardGenerator final : c10::GeneratorImpl {
  Generator inner = at::detail::createCPUGenerator();
  bool capturing = false;  // true during a capture that has registered it
  CardGenerator() : c10::GeneratorImpl(CARD, DispatchKeySet(DispatchKey::CUDA)) {}
  void set_current_seed(uint64_t seed) override {
    TORCH_CHECK(!recording, "operation not permitted when stream is capturing: a generator is given a seed");
    inner.set_current_seed(seed);
  }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }

 private:
  c10::GeneratorImpl* clone_impl() const override {
    auto* made = new CardGenerator();
    made->inner = inner.clone();
    return made;
  }
};

const Generator& default_generator() {
  static Generator made = at::make_generator<CardGenerator>();
  return made;
}

CardGenerator& of_card(const Generator& generator) {
  return *static_cast<CardGenerator*>(generator.unsafeGetGeneratorImpl());
}

// torch looks this name up.
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  void deviceSynchronize(DeviceIndex) const override {}
  Generator getNewGenerator(DeviceIndex) const override { return at::make_generator<CardGenerator>(); }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return default_generator(); }
};

// -- synchronization, captures and delayed copies --------------------------------------------------------------------

// Generators of the next capture, and generators of the latest capture.
std::vector<Generator> registered = {default_generator()}, known;
int64_t waited = 0, copied = 0;
bool waiting_is_an_error = false;
// Whether the capture has failed because of an operation that is not permitted in it.
bool spoiled = false;

// Synchronize: the host needs a result of the card.
void wait(const char* why) {
  waited++;
  TORCH_CHECK(!waiting_is_an_error, "called a synchronizing CUDA operation: ", why);
  spoiled = spoiled || recording;
  TORCH_CHECK(!recording, "operation not permitted when stream is capturing: ", why);
}

void draws_from(const Generator& generator) {
  TORCH_INTERNAL_ASSERT(
      recording || !of_card(generator).capturing, "Offset increment outside graph capture encountered unexpectedly.");
}

// As in torch up to 2.12, a failed capture does not undo any of this.
void begin(int64_t pool) {
  known = std::exchange(registered, {default_generator()});
  for (const Generator& each : known) of_card(each).capturing = true;
  auto found = memory.pools.find(pool);
  TORCH_INTERNAL_ASSERT(found == memory.pools.end() || found->second.graphs > 0, "it->second->use_count > 0");
  memory.pools[pool].graphs++;
  memory.underway.push_back(pool);
  memory.pool = pool;
  spoiled = false;
  recording = std::make_shared<Tape>();
}

void end_allocation(int64_t pool) {
  auto found = std::find(memory.underway.begin(), memory.underway.end(), pool);
  TORCH_CHECK(found != memory.underway.end(), "endAllocatePool: not currently recording to mempool_id");
  memory.underway.erase(found);
}

void release_pool(int64_t pool) {
  TORCH_INTERNAL_ASSERT(memory.pools.count(pool) && memory.pools[pool].graphs > 0, "uc >= 0");
  memory.pools[pool].graphs--;
}

size_t end(int64_t pool) {
  auto tape = std::exchange(recording, nullptr);
  memory.pool = 0;
  TORCH_CHECK(!spoiled, "operation failed due to a previous error during capture");
  end_allocation(pool);
  for (const Generator& each : known) of_card(each).capturing = false;
  tapes.push_back(tape);
  return tapes.size() - 1;
}

// Copies of side streams. They are delayed until something waits for them.
bool aside = false;
Tape promised;
size_t kept = 0;
void keep_promises(size_t until) {
  for (; kept < std::min(until, promised.size()); kept++) {
    promised[kept]();
    promised[kept] = nullptr;
  }
}

void now(const std::function<void()>& act) {
  act();
  if (recording) recording->push_back(act);
}

// -- kernels ---------------------------------------------------------------------------------------------------------

// Return a CPU tensor that shares the memory of a tensor on the card.
Tensor on_cpu(const Tensor& tensor) {
  if (!on_card(tensor)) return tensor;
  const auto& storage = tensor.storage();
  const auto count = static_cast<int64_t>(storage.nbytes() / tensor.itemsize());
  Tensor all = at::from_blob(storage.mutable_data(), {count}, TensorOptions().dtype(tensor.dtype()));
  return at::native::as_strided_tensorimpl(all, tensor.sizes(), tensor.strides(), tensor.storage_offset());
}

Tensor card_empty_strided(
    IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device>,
    std::optional<bool>) {
  return at::detail::empty_strided_generic(
      size, stride, &allocator, DispatchKeySet(DispatchKey::CUDA), dtype_or_default(dtype));
}

Tensor card_empty(
    IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device>, std::optional<bool>,
    std::optional<MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, DispatchKeySet(DispatchKey::CUDA), dtype_or_default(dtype), format);
}

Tensor to_card(const Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  Tensor made = card_empty_strided(tensor.sizes(), tensor.strides(), tensor.scalar_type(), {}, {}, {});
  on_cpu(made).copy_(tensor);
  return made;
}

const Tensor& card_resize(const Tensor& tensor, IntArrayRef size, std::optional<MemoryFormat>) {
  const size_t needed = (c10::multiply_integers(size) + tensor.storage_offset()) * tensor.itemsize();
  Storage storage = tensor.storage();
  if (needed > storage.nbytes()) {
    DataPtr made = allocator.allocate(needed);
    std::memcpy(made.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(made));
    storage.set_nbytes(needed);
  }
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return tensor;
}

Tensor& card_copy(Tensor& to, const Tensor& from, bool later) {
  auto act = [to = Tensor(to), from = Tensor(from)] { on_cpu(to).copy_(on_cpu(from)); };
  if (!on_card(to)) wait("a copy to the host");
  if (!on_card(from)) {
    spoiled = spoiled || recording;
    TORCH_CHECK(!recording, "operation not permitted when stream is capturing: a copy from the host");
    copied += static_cast<int64_t>(from.nbytes());
    if (!later) wait("a copy from the host");
    if (aside && later) {
      promised.push_back(act);
      return to;
    }
  }
  now(act);
  return to;
}

Tensor card_copy_from(const Tensor& from, const Tensor& to, bool later) {
  Tensor target = to;
  return card_copy(target, from, later);
}

Scalar card_item(const Tensor& tensor) {
  wait("item");
  return at::_local_scalar_dense(on_cpu(tensor));
}

Tensor& card_set(Tensor& tensor, Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  return at::native::set_storage_cpu_(tensor, std::move(storage), offset, size, stride);
}

using Flash = std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor>;

// As on a card, autograd saves no tensor of the size of the attention scores.
Flash flash(
    const Tensor& query, const Tensor& key, const Tensor& value, double dropout, bool causal, bool,
    std::optional<double> scale) {
  Tensor made = at::empty(query.transpose(1, 2).sizes(), query.options()).transpose(1, 2);
  Tensor sums = at::empty({query.size(0), query.size(1), query.size(2)}, query.options().dtype(kFloat));
  now([=] {
    auto [output, sum] = at::_scaled_dot_product_flash_attention_for_cpu(
        on_cpu(query), on_cpu(key), on_cpu(value), dropout, causal, {}, scale);
    on_cpu(made).copy_(output);
    on_cpu(sums).copy_(sum.sizes() == sums.sizes() ? sum : sum.transpose(1, 2));
  });
  Tensor none = at::empty({0}, query.options().dtype(kLong));
  return {made, sums, Tensor(), Tensor(), query.size(2), key.size(2), none, none, Tensor()};
}

std::tuple<Tensor, Tensor, Tensor> flash_backward(
    const Tensor& gradient, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& output,
    const Tensor& sums, const Tensor&, const Tensor&, c10::SymInt, c10::SymInt, double dropout, bool causal, const Tensor&,
    const Tensor&, std::optional<double> scale) {
  Tensor q = at::empty_like(query), k = at::empty_like(key), v = at::empty_like(value);
  now([=] {
    auto [of_query, of_key, of_value] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        on_cpu(gradient), on_cpu(query), on_cpu(key), on_cpu(value), on_cpu(output), on_cpu(sums), dropout, causal, {},
        scale);
    on_cpu(q).copy_(of_query);
    on_cpu(k).copy_(of_key);
    on_cpu(v).copy_(of_value);
  });
  return {q, k, v};
}

Tensor attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask, double dropout,
    bool causal, std::optional<double> scale, bool grouped) {
  if ((mask && mask->defined()) || grouped || dropout > 0)
    return std::get<0>(
        at::_scaled_dot_product_attention_math(query, key, value, mask, dropout, causal, {}, scale, grouped));
  return std::get<0>(at::_scaled_dot_product_flash_attention(query, key, value, dropout, causal, false, scale));
}

// An operation's arguments, with CPU tensors that share the card's memory. Outputs to resize become empty tensors.
struct Given {
  std::vector<IValue> values;
  std::vector<std::tuple<size_t, Tensor>> grown;
};

Tensor renamed(const Tensor& tensor, const c10::FunctionSchema& schema, const std::string& argument) {
  TORCH_CHECK(
      !tensor.defined() || on_card(tensor) || tensor.dim() == 0,
      "Expected all tensors to be on the same device: ", schema.operator_name(), " was given ", argument, " ",
      tensor.sizes(), " on the CPU");
  return on_cpu(tensor);
}

Given given(const c10::FunctionSchema& schema, const std::vector<IValue>& arguments) {
  Given made;
  for (size_t i = 0; i < arguments.size(); i++) {
    const auto& value = arguments[i];
    const auto& argument = schema.arguments()[i];
    const bool written = argument.alias_info() && argument.alias_info()->isWrite();
    if (value.isTensor() && written && on_card(value.toTensor()) && value.toTensor().numel() == 0) {
      made.grown.emplace_back(i, value.toTensor());
      made.values.emplace_back(at::empty({0}, TensorOptions().dtype(value.toTensor().dtype())));
    } else if (value.isTensor()) {
      made.values.emplace_back(renamed(value.toTensor(), schema, argument.name()));
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& each : value.toTensorVector()) list.push_back(renamed(each, schema, argument.name()));
      made.values.emplace_back(list);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const auto& each : value.toOptionalTensorVector()) {
        // torch accepts an index on the CPU and synchronizes for it.
        if (each && each->defined() && !on_card(*each) && each->dim() > 0) wait("an index on the CPU");
        list.push_back(each && each->defined() ? std::optional<Tensor>(on_cpu(*each)) : std::nullopt);
      }
      made.values.emplace_back(list);
    } else if (value.isGenerator() && value.toGenerator().device() == CARD) {
      TORCH_CHECK(
          !recording || std::count(known.begin(), known.end(), value.toGenerator()),
          "operation not permitted when stream is capturing: a generator that is not the graph's");
      draws_from(value.toGenerator());
      made.values.emplace_back(of_card(value.toGenerator()).inner);
    } else if (value.isDevice()) {
      made.values.emplace_back(Device(kCPU));
    } else {
      made.values.push_back(value);
    }
  }
  return made;
}

torch::jit::Stack computed(const c10::OperatorHandle& op, const Given& given) {
  torch::jit::Stack stack(given.values.begin(), given.values.end());
  for (const auto& [place, tensor] : given.grown) stack[place] = at::empty({0}, given.values[place].toTensor().options());
  const torch::jit::Stack arguments = stack;
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), &stack);
  for (const auto& [place, tensor] : given.grown) {
    const Tensor result = arguments[place].toTensor();
    if (tensor.numel() != result.numel()) card_resize(tensor, result.sizes(), std::nullopt);
    if (result.numel()) on_cpu(tensor).copy_(result);
  }
  return stack;
}

// Run any operation without a kernel above.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  static const std::set<std::string> waiting = {
      "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::equal", "aten::repeat_interleave"};
  const auto& schema = op.schema();
  const auto& name = schema.operator_name().name;
  if (waiting.count(name)) wait(name.c_str());
  if (op.hasTag(at::Tag::nondeterministic_seeded)) draws_from(default_generator());
  const auto arguments = torch::jit::pop(*stack, schema.arguments().size());
  const Given inputs = given(schema, arguments);
  const torch::jit::Stack results = computed(op, inputs);
  // Number of a result, index in a list of results, and the result's tensor on the card.
  std::vector<std::tuple<size_t, int64_t, Tensor>> outputs;
  for (size_t r = 0; r < results.size(); r++) {
    const auto* alias = schema.returns()[r].alias_info();
    const IValue* same = nullptr;
    for (size_t i = 0; alias && alias->isWrite() && i < arguments.size() && !same; i++) {
      const auto* other = schema.arguments()[i].alias_info();
      if (other && *other == *alias) same = &arguments[i];
    }
    if (same) {
      stack->push_back(*same);
    } else if (results[r].isTensor()) {
      outputs.emplace_back(r, -1, to_card(results[r].toTensor()));
      stack->emplace_back(std::get<2>(outputs.back()));
    } else if (results[r].isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& each : results[r].toTensorVector()) {
        outputs.emplace_back(r, static_cast<int64_t>(list.size()), to_card(each));
        list.push_back(std::get<2>(outputs.back()));
      }
      stack->emplace_back(list);
    } else {
      stack->push_back(results[r]);
    }
  }
  if (!recording) return;
  // `arguments` owns the memory that `inputs` shares.
  recording->push_back([op, arguments, inputs, outputs] {
    const torch::jit::Stack again = computed(op, inputs);
    for (const auto& [r, place, tensor] : outputs)
      if (tensor.defined()) on_cpu(tensor).copy_(place < 0 ? again[r].toTensor() : again[r].toTensorVector()[place]);
  });
}

void replay(size_t number) {
  at::AutoDispatchBelowADInplaceOrView below;
  for (const auto& act : *tapes[number]) act();
}

}  // namespace

namespace at {
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, AutogradCUDA, m) {
  m.impl("scaled_dot_product_attention", attention);
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", card_empty);
  m.impl("empty_strided", card_empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("resize_", card_resize);
  m.impl("set_.source_Storage_storage_offset", card_set);
  m.impl("copy_", card_copy);
  m.impl("_copy_from", card_copy_from);
  m.impl("_local_scalar_dense", card_item);
  m.impl("scaled_dot_product_attention", attention);
  m.impl("_scaled_dot_product_flash_attention", flash);
  m.impl("_scaled_dot_product_flash_attention_backward", flash_backward);
  // torch would decompose these into kernels that only a real card has.
  for (const char* name :
       {"convolution", "convolution_backward", "native_group_norm", "native_group_norm_backward", "native_layer_norm",
        "native_layer_norm_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

// -- functions for Python --------------------------------------------------------------------------------------------

// card.py calls them with ctypes. With pybind11 the compilation would take a third longer.
template <typename Act>
auto raising(const Act& act) -> decltype(act()) {
  try {
    return act();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return 0;
  }
}

#define VALUE(name, expression) \
  extern "C" int64_t card_##name(int64_t number) { return raising([&]() -> int64_t { return expression; }); }
#define ACT(name, expression) VALUE(name, (expression, 0))

ACT(present, c10::SetAllocator(DeviceType::CUDA, &allocator))
VALUE(live, memory.live)  // bytes that are allocated
VALUE(peak, memory.peak)  // most of them since `reset_peak`
ACT(reset_peak, (memory.peak = memory.live, memory.reserved_peak = memory.reserved))
VALUE(reserved, memory.reserved)  // bytes that are allocated or cached
VALUE(reserved_peak, memory.reserved_peak)
ACT(empty_cache, empty_cache())
ACT(on_stream, memory.stream = number)
ACT(waiting_is_an_error, waiting_is_an_error = number)
VALUE(room, memory.room < 0 ? int64_t(1) << 34 : memory.room)
ACT(set_room, memory.room = number)  // bytes of the card; -1: no end
VALUE(waited, waited)  // how often the host waited for the card
VALUE(copied, copied)  // bytes copied from the host
ACT(register_generator, registered.push_back(THPGenerator_Unwrap(reinterpret_cast<PyObject*>(number))))
ACT(begin, begin(number))
VALUE(capturing, recording != nullptr)
VALUE(end, end(number))
ACT(end_allocation, end_allocation(number))
ACT(release_pool, release_pool(number))
VALUE(captures, tapes.size())  // how many have succeeded
ACT(replay, replay(number))
ACT(forget, tapes[number] = nullptr)
ACT(aside, aside = number)
VALUE(promised, promised.size())
ACT(keep_promises, keep_promises(number))

// Pool, bytes reserved, bytes allocated.
extern "C" PyObject* card_pools() {
  PyObject* pools = PyList_New(0);
  for (const auto& [pool, each] : memory.pools) {
    int64_t bytes = each.live;
    for (const auto& [bin, cached] : memory.cached) bytes += bin.first == pool ? cached : 0;
    PyObject* row = Py_BuildValue("LLL", pool, bytes, each.live);
    PyList_Append(pools, row);
    Py_DECREF(row);
  }
  return pools;
}
