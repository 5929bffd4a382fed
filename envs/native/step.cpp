// Steps persistent simulators from a queue, and gathers what is read of them after every step.
//
// Compiled at first use by build.py, called by simulators.py. It calls MuJoCo by pointers and knows no layout of its
// structs: what is read and written of an mjData comes as addresses of its arrays. So it needs no MuJoCo headers, and
// nothing is linked. MuJoCo's own code does all arithmetic; what is done here is copies, bounds and comparisons.
#include <atomic>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <exception>
#include <new>
#include <thread>
#include <vector>

#include <setjmp.h>

namespace {

using ErrorHandler = void (*)(const char*);

// What is passed of MuJoCo; the order is that of `Functions` in build.py.
struct Functions {
    void (*step)(const void* model, void* data);
    void (*contact_forces)(const void* model, void* data);
    void (*set_state)(const void* model, void* data, const double* state, int signature);
    ErrorHandler (*get_error_handler)();
    void (*set_error_handler)(ErrorHandler);
};

// Part of an observation: `count` entries of a field from `start` on, in [low, high] where `clipped`.
struct Part {
    int field, start, count, clipped;
    double low, high;
};

// MuJoCo reports an error by a function that must not return. Without one of our own it ends the process.
thread_local jmp_buf escape;
thread_local char message[1024];

void leave(const char* text) {
    std::snprintf(message, sizeof message, "%s", text);
    _longjmp(escape, 1);
}

// Whether MuJoCo, called from this thread, is not to look at its clock.
thread_local bool untimed = false;

void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Waits until the value is another than `old`. A sleeping thread takes tens of microseconds to wake, so it first spins;
// not for longer, because the core may be wanted by others.
constexpr std::chrono::microseconds SPIN{20};

int wait_while(const std::atomic<int>& value, int old) {
    const auto end = std::chrono::steady_clock::now() + SPIN;
    int now;
    do {
        for (int k = 0; k < 16; ++k) {
            if ((now = value.load()) != old) return now;
            pause_briefly();
        }
    } while (std::chrono::steady_clock::now() < end);
    value.wait(old);
    return value.load();
}

// numpy.clip of one number, NaN and signed zeros included.
double clip(double x, double low, double high) {
    if (std::isnan(x)) return x;
    x = x > low ? x : low;
    return x < high ? x : high;
}

struct Batch {
    Functions functions;
    int n, controls, warnings, warning_stride;
    void* const* models;              // [n], the caller's, as all pointers to pointers here
    void* const* datas;               // [n]
    double* const* control;           // [n]: `controls` numbers each
    const char* const* warning;       // [n]: `warnings` ints, `warning_stride` bytes apart
    std::vector<const double*> sources;  // [fields * n]
    std::vector<int> sizes;           // [fields]
    std::vector<Part> parts;

    // Of the step in progress. Written before `next` is, and read by who got a number from `next`.
    const double* actions = nullptr;
    double* fields = nullptr;
    double* observations = nullptr;
    unsigned char* bad = nullptr;
    int frames = 1, width = 0;
    bool contact_forces = false, timed = true;

    std::atomic<int> next{0};   // the next environment to be stepped
    std::atomic<int> left{0};   // environments of this step that are not ready
    std::atomic<int> begun{0};  // counts steps; threads sleep on it
    std::atomic<bool> ends{false};
    std::atomic<bool> failed{false};
    char error[sizeof message] = "";
    std::vector<std::thread> threads;

    void simulate(int i) {
        if (_setjmp(escape)) {
            if (!failed.exchange(true)) std::memcpy(error, message, sizeof error);  // the first of a step is told
            return;
        }
        untimed = !timed;
        for (int k = 0; k < frames; ++k) functions.step(models[i], datas[i]);
        if (contact_forces) functions.contact_forces(models[i], datas[i]);
    }

    // Returns whether the simulator is sound.
    bool gather(int i) {
        double* out = fields;
        for (size_t f = 0; f < sizes.size(); ++f) {
            const size_t size = sizes[f];
            std::memcpy(out + i * size, sources[f * n + i], size * sizeof(double));
            out += n * size;
        }
        bool broken = false;
        for (int w = 0; w < warnings; ++w) {
            int number;
            std::memcpy(&number, warning[i] + static_cast<size_t>(w) * warning_stride, sizeof number);
            broken |= number != 0;
        }
        double* row = observations + static_cast<size_t>(i) * width;
        for (const Part& part : parts) {
            const double* source = sources[static_cast<size_t>(part.field) * n + i] + part.start;
            for (int k = 0; k < part.count; ++k, ++row) {
                *row = part.clipped ? clip(source[k], part.low, part.high) : source[k];
                broken |= !std::isfinite(*row);
            }
        }
        return !broken;
    }

    // Whoever is awake takes the next environment: a thread that the system has put aside holds up only its own.
    void work() {
        for (int i; (i = next.fetch_add(1)) < n;) {
            std::memcpy(control[i], actions + static_cast<size_t>(i) * controls, controls * sizeof(double));
            simulate(i);
            bad[i] = !gather(i);
            if (left.fetch_sub(1) == 1) left.notify_all();
        }
    }

    void serve() {
        functions.set_error_handler(leave);
        for (int seen = 0;;) {
            seen = wait_while(begun, seen);
            if (ends) return;
            work();
        }
    }
};

}  // namespace

extern "C" {

// Null if there is no memory. Fewer threads are started where the system gives no more.
Batch* driftrl_make(const Functions* functions, int n, int threads, void* const* models, void* const* datas,
                    double* const* control, int controls, const char* const* warning, int warnings,
                    int warning_stride) noexcept {
    Batch* batch = new (std::nothrow) Batch{};
    if (!batch) return nullptr;
    batch->functions = *functions;
    batch->n = n;
    batch->models = models;
    batch->datas = datas;
    batch->control = control;
    batch->controls = controls;
    batch->warning = warning;
    batch->warnings = warnings;
    batch->warning_stride = warning_stride;
    sigset_t others, before;  // signals are for the program's own threads, but for those that a thread causes itself
    sigfillset(&others);
    for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) sigdelset(&others, fault);
    pthread_sigmask(SIG_SETMASK, &others, &before);
    try {
        batch->threads.reserve(threads);
        for (int k = 1; k < threads; ++k) batch->threads.emplace_back([batch] { batch->serve(); });
    } catch (const std::exception&) {
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return batch;
}

// What is gathered from the next step on: fields [fields][n] of the given sizes, and observations made of them.
// Nonzero if there is no memory.
int driftrl_read(Batch* batch, int fields, const double* const* sources, const int* sizes, int parts,
                 const Part* part) noexcept {
    try {
        batch->sources.assign(sources, sources + static_cast<size_t>(fields) * batch->n);
        batch->sizes.assign(sizes, sizes + fields);
        batch->parts.assign(part, part + parts);
    } catch (const std::exception&) {
        return 1;
    }
    batch->width = 0;
    for (const Part& each : batch->parts) batch->width += each.count;
    return 0;
}

// Steps all by the actions [n, controls]. Writes the fields one after the other, each [n, size], the observations
// [n, width], and whether MuJoCo warned or a number of the observation is not finite, [n]. Returns what the first error
// says, until the next one of this thread, or null.
const char* driftrl_step(Batch* batch, const double* actions, int frames, int contact_forces, int timed, double* fields,
                         double* observations, unsigned char* bad) noexcept {
    batch->actions = actions;
    batch->frames = frames;
    batch->contact_forces = contact_forces;
    batch->timed = timed;
    batch->fields = fields;
    batch->observations = observations;
    batch->bad = bad;
    batch->failed = false;
    const ErrorHandler before = batch->functions.get_error_handler();
    batch->functions.set_error_handler(leave);
    batch->left = batch->n;
    batch->next = 0;  // from here on the others work
    if (!batch->threads.empty()) {
        batch->begun.fetch_add(1);
        batch->begun.notify_all();
    }
    batch->work();
    for (int left = batch->left; left; left = wait_while(batch->left, left)) {
    }
    batch->functions.set_error_handler(before);
    untimed = false;
    if (!batch->failed) return nullptr;
    std::memcpy(message, batch->error, sizeof message);
    return message;
}

// Sets the states [count, size] of some simulators, and gathers them again into what the last step wrote.
void driftrl_restart(Batch* batch, const int* which, int count, const double* states, int size, int signature,
                     double* fields, double* observations) noexcept {
    batch->fields = fields;
    batch->observations = observations;
    for (int k = 0; k < count; ++k) {
        const int i = which[k];
        batch->functions.set_state(batch->models[i], batch->datas[i], states + static_cast<size_t>(k) * size, signature);
        batch->gather(i);
    }
}

// MuJoCo's clock, and what stands in its place: the time means nothing within a step that is not timed.
double (*driftrl_their_clock)() = nullptr;

double driftrl_clock() { return untimed || !driftrl_their_clock ? 0 : driftrl_their_clock(); }

// Ends and joins the threads.
void driftrl_end(Batch* batch) noexcept {
    batch->ends = true;
    batch->begun.fetch_add(1);
    batch->begun.notify_all();
    for (std::thread& thread : batch->threads) thread.join();
    delete batch;
}

}  // extern "C"
