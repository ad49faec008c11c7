// The device of cuda_runtime.h: runs the threads of a block as fibers, and finds what they do wrong.
//
// A thread runs until it waits for others. A warp goes on when all its lanes wait at the same place for the same, a
// block when all its threads do; anything else, a thread that has left among them, is a barrier in divergent code and
// fails the launch. Shared memory is full of NaN when a block starts, and nobody may write next to it.
//
// A group of warps that meets in __barrier_sync_count goes on when all its threads wait at the same place, whatever the
// others of the block do meanwhile; the launch fails when nobody can go on. CUDA only counts who comes. Here a group of
// n threads begins at a multiple of n, and from one __syncthreads to the next a barrier is for one group only, because
// on a GPU two groups may be there at once although they are not here.
//
// Compiled without sanitizers, whose functions are here where the kernels were compiled with them:
// - AddressSanitizer also finds who reads next to shared memory.
// - To ThreadSanitizer, every CUDA thread is a thread, and only barriers order what they do: __syncthreads for the
//   block, __barrier_sync_count for the group, __syncwarp for the warp, and a shuffle nothing. Blocks are not ordered
//   either, so that it finds two that write to the same place although here one runs after the other.
#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

dim3 gridDim, blockDim, blockIdx(0, 0, 0), threadIdx(0, 0, 0);
int ntm_planted = 0;

extern "C" {
#define WEAK __attribute__((weak))
WEAK void __asan_poison_memory_region(const volatile void*, std::size_t);
WEAK void __asan_unpoison_memory_region(const volatile void*, std::size_t);
WEAK void __sanitizer_start_switch_fiber(void** save, const void* bottom, std::size_t size);
WEAK void __sanitizer_finish_switch_fiber(void* save, const void** bottom, std::size_t* size);
WEAK void* __tsan_get_current_fiber();
WEAK void* __tsan_create_fiber(unsigned flags);
WEAK void __tsan_destroy_fiber(void*);
WEAK void __tsan_switch_to_fiber(void*, unsigned flags);
WEAK void __tsan_set_fiber_name(void*, const char*);
WEAK void __tsan_acquire(void*);
WEAK void __tsan_release(void*);
#undef WEAK
}

// --- shared memory ---------------------------------------------------------------------------------------------------

namespace {
constexpr std::size_t page = 4096, shared_per_processor = 227 << 10, guard = 1024;
}
extern "C" {
alignas(page) unsigned char ntm_shared_room[page + (228 << 10) + page];
}
asm(".globl ntm_shared\n.hidden ntm_shared\n.set ntm_shared, ntm_shared_room + 4096");  // what the kernels see of it

namespace on_host {

bool trace = false;

namespace {

const bool address_sanitizer = __asan_poison_memory_region, thread_sanitizer = __tsan_create_fiber;

// --- one fiber for each thread of a block ----------------------------------------------------------------------------

constexpr unsigned warp_size = 32, most_threads = 1024, block_barriers = 16;  // the first of these is __syncthreads
constexpr std::size_t stack_size = 256 << 10;

#if defined(__x86_64__)
struct Context {
    void* stack_pointer = nullptr;
};
extern "C" void ntm_switch(void** from, void* to);
asm(R"(
.text
.type ntm_switch, @function
ntm_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size ntm_switch, .-ntm_switch
)");
void begin_at(Context& context, char* stack, void (*entry)()) {
    auto top = reinterpret_cast<void**>(stack + stack_size) - 1;  // the entry finds it as after a call
    *--top = reinterpret_cast<void*>(entry);
    context.stack_pointer = top - 6;
}
void switch_context(Context& from, Context& to) { ntm_switch(&from.stack_pointer, to.stack_pointer); }
#else
using Context = ucontext_t;
void begin_at(Context& context, char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = stack_size;
    makecontext(&context, entry, 0);
}
void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

struct Fiber {
    enum State : char { new_born, runs, waits, left };

    Context context;
    char* stack = nullptr;
    State state = new_born;
    Meeting meeting = block_barrier;
    Place place = {};
    unsigned id = 0, count = 0;  // of the block's barrier, and of the threads that meet there
    std::uint64_t bits = 0;  // that a shuffle brings, and takes
    unsigned source = 0;
    void* asan_stack = nullptr;
    void* tsan_fiber = nullptr;
};

std::mutex one_launch;  // at a time: torch's threads may call at once
Fiber fibers[2][most_threads];  // of even and of odd blocks
Fiber *block_fibers, *current;
Context scheduler;
void (*thread_function)(void*);
void* thread_argument;

void *scheduler_tsan, *scheduler_asan;
const void* scheduler_stack;
std::size_t scheduler_stack_size;

// What ThreadSanitizer knows of barriers: a thread gives what it did to the barrier's mark, and takes what the others
// gave. Two marks in turn, or a thread that is at the next barrier already would give it to those still at this one.
struct Barrier {
    char marks[2];
    bool turn;              // changes when all have come
    unsigned first, count;  // the threads whose barrier it is until the next __syncthreads; none: anyone's
};
std::vector<Barrier> barriers, warp_barriers;  // new for each block: what is freed orders nothing any more
char start_mark, end_mark;

void release(char& mark) {
    if (thread_sanitizer) __tsan_release(&mark);
}
void acquire(char& mark) {
    if (thread_sanitizer) __tsan_acquire(&mark);
}

void suspend() {
    Fiber& self = *current;
    if (thread_sanitizer) __tsan_switch_to_fiber(scheduler_tsan, 1);  // 1: the switch orders nothing
    if (address_sanitizer)
        __sanitizer_start_switch_fiber(&self.asan_stack, scheduler_stack, scheduler_stack_size);
    switch_context(self.context, scheduler);
    if (address_sanitizer) __sanitizer_finish_switch_fiber(self.asan_stack, &scheduler_stack, &scheduler_stack_size);
}

void fiber_main() {
    if (address_sanitizer) __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
    for (;;) {
        acquire(start_mark);
        thread_function(thread_argument);
        release(end_mark);
        current->state = Fiber::left;
        suspend();
    }
}

void resume(Fiber& fiber, unsigned index) {
    current = &fiber;
    threadIdx.x = index;
    fiber.state = Fiber::runs;
    if (thread_sanitizer) __tsan_switch_to_fiber(fiber.tsan_fiber, 1);
    if (address_sanitizer) __sanitizer_start_switch_fiber(&scheduler_asan, fiber.stack, stack_size);
    switch_context(scheduler, fiber.context);
    if (address_sanitizer) __sanitizer_finish_switch_fiber(scheduler_asan, nullptr, nullptr);
}

// Makes a fiber that starts afresh: it is new, or it still waits in a block that failed.
void create(Fiber& fiber, unsigned index) {
    if (!fiber.stack) {
        void* room = mmap(nullptr, page + stack_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (room == MAP_FAILED || mprotect(room, page, PROT_NONE)) std::perror("no stack for a fiber"), std::abort();
        fiber.stack = static_cast<char*>(room) + page;
    }
    if (address_sanitizer) __asan_unpoison_memory_region(fiber.stack, stack_size);
    if (thread_sanitizer) {
        if (fiber.tsan_fiber) __tsan_destroy_fiber(fiber.tsan_fiber);
        fiber.tsan_fiber = __tsan_create_fiber(1);
        __tsan_set_fiber_name(fiber.tsan_fiber, ("CUDA thread " + std::to_string(index)).c_str());
    }
    begin_at(fiber.context, fiber.stack, fiber_main);
}

// --- a block ---------------------------------------------------------------------------------------------------------

thread_local cudaError_t last_error;
thread_local std::string failure;

cudaError_t failed(cudaError_t error) { return last_error = error; }

bool fault(const std::string& text) {
    failure = "block " + std::to_string(blockIdx.x) + ": " + text;
    return false;
}

bool reported = false;  // by a sanitizer: then the launch fails

std::string described(unsigned index) {
    const Fiber& fiber = block_fibers[index];
    std::string text = "thread " + std::to_string(index);
    if (fiber.state == Fiber::left) return text + " has left the kernel";
    const std::string names[] = {
        "__syncthreads", "barrier " + std::to_string(fiber.id) + " of " + std::to_string(fiber.count) + " threads",
        "__syncwarp", "a shuffle"};
    const std::string file = fiber.place.file;
    return text + " waits in " + names[fiber.meeting] + " at " + file.substr(file.rfind('/') + 1) + ":" +
           std::to_string(fiber.place.line);
}

// Whether two threads have come to the same
bool together(unsigned a, unsigned b) {
    const Fiber &x = block_fibers[a], &y = block_fibers[b];
    if (x.state != y.state || x.state == Fiber::left) return x.state == y.state;
    const bool same_file = x.place.file == y.place.file || !std::strcmp(x.place.file, y.place.file);
    return x.meeting == y.meeting && x.id == y.id && x.count == y.count && x.place.line == y.place.line && same_file;
}

// The block's warps, each that has come to something else than the one before
std::string all_described() {
    std::string text = described(0);
    for (unsigned first = warp_size; first < blockDim.x; first += warp_size)
        if (!together(first - warp_size, first)) text += ", " + described(first);
    return text;
}

// A warp has come to a barrier of its group: is there such a barrier, and no other group's?
bool comes_to_its_own(unsigned first) {
    const Fiber& leader = block_fibers[first];
    if (!leader.id || leader.id >= block_barriers || !leader.count || leader.count % warp_size)
        return fault("no such barrier: " + described(first));
    Barrier& barrier = barriers[leader.id];
    const unsigned group = first / leader.count * leader.count;
    if (!barrier.count) barrier.first = group, barrier.count = leader.count;
    if (barrier.first == group && barrier.count == leader.count) return true;
    return fault("another group's barrier: " + described(first) + ", which is for threads " +
                 std::to_string(barrier.first) + " to " + std::to_string(barrier.first + barrier.count - 1) +
                 " until the next __syncthreads");
}

// Runs a warp until its lanes have left or wait for other warps.
bool run_warp(unsigned first) {
    const unsigned end = std::min(first + warp_size, blockDim.x);
    Fiber& leader = block_fibers[first];
    do {
        for (unsigned i = first; i < end; ++i) {
            resume(block_fibers[i], i);
            if (reported) return fault("see the sanitizer's report");
        }
        for (unsigned i = first; i < end; ++i)
            if (!together(first, i)) return fault("divergent: " + described(first) + ", " + described(i));
        if (leader.state == Fiber::waits && leader.meeting == shuffle) {
            std::uint64_t sent[warp_size];
            for (unsigned i = first; i < end; ++i) sent[i - first] = block_fibers[i].bits;
            for (unsigned i = first; i < end; ++i) {
                const unsigned source = block_fibers[i].source;
                if (first + source >= end) return fault("a shuffle from a lane that there is not, " + described(i));
                block_fibers[i].bits = sent[source];
            }
        }
        if (leader.meeting == warp_barrier) warp_barriers[first / warp_size].turn ^= 1;
    } while (leader.state == Fiber::waits && (leader.meeting == warp_barrier || leader.meeting == shuffle));
    return leader.state == Fiber::left || leader.meeting == block_barrier || comes_to_its_own(first);
}

// The warps whose barrier all have come to become ready. Are there any?
bool let_go(bool* ready /*[warps]*/) {
    bool any = false;
    for (unsigned first = 0; first < blockDim.x; first += warp_size) {
        const Fiber& leader = block_fibers[first];
        if (leader.state == Fiber::left || first % leader.count || first + leader.count > blockDim.x) continue;
        unsigned next = first;
        while (next < first + leader.count && together(first, next)) next += warp_size;
        if (next < first + leader.count) continue;
        barriers[leader.id].turn ^= 1;
        if (leader.meeting == block_barrier)
            for (Barrier& barrier : barriers) barrier.count = 0;
        std::fill(ready + first / warp_size, ready + next / warp_size, true);
        any = true;
    }
    return any;
}

bool run_block(std::size_t size) {
    unsigned char *const room = ntm_shared_room, *const shared = room + page, *const end = shared + size;
    if (address_sanitizer) __asan_unpoison_memory_region(room, sizeof ntm_shared_room);
    // To ThreadSanitizer this memory is new: what earlier blocks did in its place is no race.
    const std::size_t used = page + (size + guard + page - 1) / page * page;
    if (thread_sanitizer) mmap(room, used, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    // NaN as float and as double; by a loop, since memset would have the sanitizers look at every byte
    for (volatile unsigned char* p = shared - guard; p != end + guard; ++p) *p = 0xff;
    if (address_sanitizer) {
        __asan_poison_memory_region(room, page);
        __asan_poison_memory_region(end, room + sizeof ntm_shared_room - end);
    }
    block_fibers = fibers[blockIdx.x % 2];
    for (unsigned i = 0; i < blockDim.x; ++i)
        if (block_fibers[i].state != Fiber::left) create(block_fibers[i], i);
    barriers = std::vector<Barrier>(block_barriers);
    warp_barriers = std::vector<Barrier>(most_threads / warp_size);
    release(start_mark);
    bool ready[most_threads / warp_size];
    std::fill(std::begin(ready), std::end(ready), true);
    do {
        for (unsigned first = 0; first < blockDim.x; first += warp_size)
            if (std::exchange(ready[first / warp_size], false) && !run_warp(first)) return false;
    } while (let_go(ready));
    const auto waits = [](const Fiber& fiber) { return fiber.state == Fiber::waits; };
    if (std::any_of(block_fibers, block_fibers + blockDim.x, waits)) return fault("divergent: " + all_described());
    if (address_sanitizer) __asan_unpoison_memory_region(room, sizeof ntm_shared_room);
    for (std::size_t i = 0; i < guard; ++i) {
        if (end[i] != 0xff) return fault("wrote behind its shared memory, at +" + std::to_string(i));
        if (shared[-1 - i] != 0xff) return fault("wrote before its shared memory, at -" + std::to_string(i + 1));
    }
    return true;
}

// --- limits ----------------------------------------------------------------------------------------------------------

// Small, so that kernels for memories that do not fit run at the sizes of tests too.
std::size_t most_shared() {
    const char* wanted = std::getenv("NTM_HOST_SHARED");
    return wanted ? std::min<std::size_t>(std::atol(wanted), shared_per_processor) : 48 << 10;
}

std::map<const void*, std::size_t>& allowed_shared() {
    static std::map<const void*, std::size_t> bytes;
    return bytes;
}

// --- a launch --------------------------------------------------------------------------------------------------------

// As far as the dynamic linker knows it: in programs, not in a backend, which hides its names
std::string name_of(const void* kernel) {
    Dl_info found;
    if (!dladdr(kernel, &found) || !found.dli_sname) return "a kernel";
    char* name = abi::__cxa_demangle(found.dli_sname, nullptr, nullptr, nullptr);
    const std::string text = name ? name : found.dli_sname;
    std::free(name);
    return text.substr(0, text.find('('));
}

// To ThreadSanitizer, what the threads did comes before what follows the launch: those say so that have left, and on
// behalf of those that a failure has stopped it is said here.
void join() {
    if (!thread_sanitizer) return;
    for (auto& set : fibers)
        for (Fiber& fiber : set)
            if (fiber.state == Fiber::waits) {
                __tsan_switch_to_fiber(fiber.tsan_fiber, 1);
                release(end_mark);
            }
    __tsan_switch_to_fiber(scheduler_tsan, 1);
    acquire(end_mark);
}

}  // namespace

cudaError_t allow_shared(const void* kernel, int bytes) {
    const std::lock_guard lock(one_launch);
    if (!kernel || bytes < 0 || std::size_t(bytes) > most_shared()) return failed(cudaErrorInvalidValue);
    allowed_shared()[kernel] = bytes;
    return cudaSuccess;
}

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, std::size_t shared, void (*thread)(void*),
                   void* argument) {
    const std::lock_guard lock(one_launch);
    const auto allowed = allowed_shared().find(kernel);
    const std::size_t most = std::max<std::size_t>(48 << 10, allowed == allowed_shared().end() ? 0 : allowed->second);
    if (shared > std::min(most, most_shared())) return failed(cudaErrorInvalidValue);
    if (!grid.x || !block.x || block.x > most_threads || grid.y * grid.z * block.y * block.z != 1)
        return failed(cudaErrorInvalidConfiguration);
    if (trace)
        std::fprintf(stderr, "launch %s of %u x %u, %zu bytes\n", name_of(kernel).c_str(), grid.x, block.x, shared);
    gridDim = grid, blockDim = block;
    thread_function = thread, thread_argument = argument;
    if (thread_sanitizer) scheduler_tsan = __tsan_get_current_fiber();
    reported = false;
    bool right = true;
    for (blockIdx.x = 0; right && blockIdx.x < grid.x; ++blockIdx.x) right = run_block(shared);
    join();
    if (right) return cudaSuccess;
    std::fprintf(stderr, "cuda_on_host: %s\n", failure.c_str());
    return failed(cudaErrorLaunchFailure);
}

void meet(Meeting meeting, Place place, unsigned id, unsigned count) {
    Fiber& self = *current;
    self.state = Fiber::waits;
    self.meeting = meeting;
    self.place = place;
    self.id = id, self.count = count;
    if (meeting == shuffle) return suspend();
    // With an id that there is not, nobody goes on from here.
    Barrier& barrier = meeting == warp_barrier ? warp_barriers[threadIdx.x / warp_size] : barriers[id % block_barriers];
    char& mark = barrier.marks[barrier.turn];
    release(mark);
    suspend();
    acquire(mark);
}

std::uint64_t exchange(std::uint64_t bits, unsigned source, unsigned mask, Place place) {
    if (mask != ~0u) std::fprintf(stderr, "cuda_on_host: shuffles are for whole warps\n"), std::abort();
    Fiber& self = *current;
    self.bits = bits;
    self.source = source;
    meet(shuffle, place);
    return self.bits;
}

}  // namespace on_host

// The sanitizers call these after a report, where they do not end the program.
extern "C" {
void __tsan_on_report(void*) { on_host::reported = true; }
void __asan_on_error() { on_host::reported = true; }
}

// --- the runtime -----------------------------------------------------------------------------------------------------

using namespace on_host;

cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device ? failed(cudaErrorInvalidDevice) : cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    if (device) return failed(cudaErrorInvalidDevice);
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount: *value = 2; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = shared_per_processor; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(most_shared()); break;
        case cudaDevAttrReservedSharedMemoryPerBlock: *value = 1024; break;
        default: return failed(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}

cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        case cudaErrorInvalidDevice: return "invalid device ordinal";
        case cudaErrorLaunchFailure: return failure.c_str();
    }
    return "unrecognized error code";
}
