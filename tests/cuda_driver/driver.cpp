// A stand-in for libcuda.so.1, so that what Carole asks of the driver runs where there is no device: contexts, streams,
// events, memory that other processes can open, and Carole's own kernels, in their host form. Streams run on threads of their own and dawdle at random, so that who does not
// wait finds the wrong bytes. Device memory cannot be touched by the host: its addresses are mapped without access,
// and the streams' threads reach the bytes elsewhere. What another process has opened can only be read.
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <dlfcn.h>
#include <fcntl.h>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <vector>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, NOT_READY = 600, NOT_FOUND = 500 };

struct Moment {
    std::mutex mutex;
    std::condition_variable changed;
    bool over = false;
    void end() {
        std::lock_guard<std::mutex> lock(mutex);
        over = true;
        changed.notify_all();
    }
    void wait() {
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait(lock, [this] { return over; });
    }
    bool is_over() {
        std::lock_guard<std::mutex> lock(mutex);
        return over;
    }
};

struct Stream {
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<std::function<void()>> work;
    std::mt19937 random{std::random_device{}()};
    Stream() {
        std::thread([this] { run(); }).detach();
    }
    void push(std::function<void()> task) {
        std::lock_guard<std::mutex> lock(mutex);
        work.push_back(std::move(task));
        changed.notify_all();
    }
    void run() {
        for (;;) {
            std::unique_lock<std::mutex> lock(mutex);
            changed.wait(lock, [this] { return !work.empty(); });
            auto task = std::move(work.front());
            work.pop_front();
            lock.unlock();
            if (random() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 2000));
            task();
        }
    }
};

struct Event {
    std::shared_ptr<Moment> last;
};

struct Block {
    char *alias;
    size_t len;
    // The descriptor of memory of our own; -1 for a peer's.
    int memory;
    uint64_t number;
};

struct Handle {
    int32_t process, memory;
    uint64_t len;
    char rest[48];
};

// What kernels/form.cuh declares.
struct Args {
    uint64_t tiles, table;
    uint32_t rows, sources;
    char rest[48];
    uint64_t inlined[384];
};
struct Lent {
    unsigned long long address, bytes, writable;
};
typedef void (*Kernel)(const Args *, unsigned grid, unsigned backwards);
extern "C" void lend(const Lent *, unsigned long long);

// What follows outlives the program's end, where the streams' threads may still look at it.
static std::mutex &blocks_mutex = *new std::mutex;
static std::map<uint64_t, Block> &blocks = *new std::map<uint64_t, Block>;
static std::mutex &streams_mutex = *new std::mutex;
static std::deque<Stream *> &streams = *new std::deque<Stream *>;

static Stream *make_stream() {
    Stream *stream = new Stream;
    std::lock_guard<std::mutex> lock(streams_mutex);
    streams.push_back(stream);
    return stream;
}
static Stream *default_stream() {
    static Stream *stream = make_stream();
    return stream;
}
static Stream *of(void *stream) {
    return (uintptr_t)stream <= 2 ? default_stream() : (Stream *)stream;
}

// Waits for all that all streams were given.
static void settle() {
    std::deque<Stream *> all;
    {
        std::lock_guard<std::mutex> lock(streams_mutex);
        all = streams;
    }
    for (Stream *stream : all) {
        auto moment = std::make_shared<Moment>();
        stream->push([=] { moment->end(); });
        moment->wait();
    }
}

// Where the bytes of device memory really are; null for what is none.
static char *alias(uint64_t address, size_t bytes) {
    std::lock_guard<std::mutex> lock(blocks_mutex);
    auto after = blocks.upper_bound(address);
    if (after == blocks.begin()) return nullptr;
    auto &[start, block] = *--after;
    return address + bytes <= start + block.len ? block.alias + (address - start) : nullptr;
}

static std::map<uint64_t, Block>::iterator block_of(uint64_t address) {
    std::lock_guard<std::mutex> lock(blocks_mutex);
    return --blocks.upper_bound(address);
}

// Maps bytes twice: where nobody can touch them, which is their address, and where the streams do.
static bool map_block(int memory, size_t len, bool own, uint64_t *address) {
    static uint64_t numbers = 0;
    void *token = mmap(nullptr, len, PROT_NONE, MAP_SHARED, memory, 0);
    void *bytes_at = mmap(nullptr, len, own ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, memory, 0);
    if (token == MAP_FAILED || bytes_at == MAP_FAILED) return false;
    std::lock_guard<std::mutex> lock(blocks_mutex);
    blocks[(uint64_t)token] = {(char *)bytes_at, len, own ? memory : -1, ++numbers};
    *address = (uint64_t)token;
    return true;
}

static int unmap_block(uint64_t address) {
    settle();
    std::lock_guard<std::mutex> lock(blocks_mutex);
    auto found = blocks.find(address);
    if (found == blocks.end()) return INVALID_VALUE;
    munmap((void *)address, found->second.len);
    munmap(found->second.alias, found->second.len);
    if (found->second.memory >= 0) close(found->second.memory);
    blocks.erase(found);
    return SUCCESS;
}

static uint64_t must_alias(uint64_t address) {
    char *there = alias(address, 0);
    if (!there) fprintf(stderr, "a kernel was given %lx, which is no device memory\n", (long)address), abort();
    return (uint64_t)there;
}

// Runs a kernel over the bytes that its rows' addresses stand for.
static void run_kernel(Kernel kernel, Args args, unsigned grid) {
    size_t stride = 3 + args.sources;
    const uint64_t *table = args.table ? (const uint64_t *)must_alias(args.table) : args.inlined;
    std::vector<uint64_t> rows(table, table + args.rows * stride);
    for (size_t row = 0; row < args.rows; row++) {
        for (size_t at = 2; at < stride; at++) rows[row * stride + at] = must_alias(rows[row * stride + at]);
    }
    args.table = (uint64_t)rows.data();
    std::vector<Lent> lent;
    {
        std::lock_guard<std::mutex> lock(blocks_mutex);
        for (auto &[start, block] : blocks) {
            lent.push_back({(uint64_t)block.alias, block.len, block.memory >= 0});
        }
    }
    lend(lent.data(), lent.size());
    kernel(&args, grid, 0);
}

extern "C" {
int cuInit(unsigned) { return SUCCESS; }
int cuDriverGetVersion(int *version) { return *version = 13000, SUCCESS; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal == 0 ? SUCCESS : INVALID_VALUE; }
int cuDeviceGetAttribute(int *value, int, int) { return *value = 4, SUCCESS; }
int cuDevicePrimaryCtxRetain(void **context, int) { return *context = (void *)1, SUCCESS; }
int cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
static thread_local int current = 0; // contexts that this thread has entered
int cuCtxPushCurrent_v2(void *) { return current++, SUCCESS; }
int cuCtxPopCurrent_v2(void **context) { return current--, *context = (void *)1, SUCCESS; }
int cuCtxGetDevice(int *device) { return *device = 0, current > 0 ? SUCCESS : 201; }
int cuCtxGetStreamPriorityRange(int *least, int *greatest) { return *least = *greatest = 0, SUCCESS; }

int cuPointerGetAttribute(void *value, int attribute, uint64_t address) {
    if (!alias(address, 0)) return INVALID_VALUE;
    switch (attribute) {
    case 2: return *(unsigned *)value = 2, SUCCESS; // CU_POINTER_ATTRIBUTE_MEMORY_TYPE: the device's
    case 7: return *(uint64_t *)value = block_of(address)->second.number, SUCCESS; // CU_POINTER_ATTRIBUTE_BUFFER_ID
    case 9: return *(int *)value = 0, SUCCESS;      // CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    default: return INVALID_VALUE;
    }
}

int cuMemAlloc_v2(uint64_t *address, size_t bytes) {
    size_t len = (bytes + 4095) & ~(size_t)4095;
    int memory = memfd_create("device", MFD_CLOEXEC);
    if (memory < 0 || ftruncate(memory, len)) return OUT_OF_MEMORY;
    return map_block(memory, len, true, address) ? SUCCESS : OUT_OF_MEMORY;
}
int cuMemFree_v2(uint64_t address) { return unmap_block(address); }
int cuMemGetAddressRange_v2(uint64_t *base, size_t *len, uint64_t address) {
    if (!alias(address, 0)) return INVALID_VALUE;
    auto block = block_of(address);
    return *base = block->first, *len = block->second.len, SUCCESS;
}

// STAND_IN_CANNOT_SHARE is a device whose memory no other process can open.
int cuIpcGetMemHandle(Handle *handle, uint64_t address) {
    if (getenv("STAND_IN_CANNOT_SHARE")) return INVALID_VALUE;
    Block &block = block_of(address)->second;
    return *handle = {getpid(), block.memory, block.len, {}}, SUCCESS;
}
int cuIpcOpenMemHandle_v2(uint64_t *address, Handle handle, unsigned flags) {
    if (handle.process == getpid() || flags != 1) return INVALID_CONTEXT;
    std::string path = "/proc/" + std::to_string(handle.process) + "/fd/" + std::to_string(handle.memory);
    int memory = open(path.c_str(), O_RDWR | O_CLOEXEC);
    bool mapped = memory >= 0 && map_block(memory, handle.len, false, address);
    close(memory);
    return mapped ? SUCCESS : INVALID_VALUE;
}
int cuIpcCloseMemHandle(uint64_t address) { return unmap_block(address); }

int cuModuleLoadData(void **module, const void *) { return *module = (void *)1, SUCCESS; }
int cuModuleUnload(void *) { return settle(), SUCCESS; }
int cuModuleGetFunction(void **function, void *, const char *name) {
    Dl_info info;
    dladdr((void *)cuModuleUnload, &info);
    *function = dlsym(dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD), name);
    return *function ? SUCCESS : NOT_FOUND;
}
int cuLaunchKernel(void *function, unsigned grid, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                   void *stream, void **parameters, void **) {
    Args args = *(Args *)parameters[0];
    return of(stream)->push([=] { run_kernel((Kernel)function, args, grid); }), SUCCESS;
}

int cuMemHostAlloc(void **host, size_t bytes, unsigned) {
    return *host = aligned_alloc(4096, (bytes + 4095) & ~(size_t)4095), *host ? SUCCESS : OUT_OF_MEMORY;
}
int cuMemHostGetDevicePointer_v2(uint64_t *device, void *host, unsigned) {
    return *device = (uint64_t)host, SUCCESS;
}
int cuMemFreeHost(void *host) { return settle(), free(host), SUCCESS; }

int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *stream) {
    char *there = alias(to, bytes);
    if (!there) return INVALID_VALUE;
    return of(stream)->push([=] { memcpy(there, from, bytes); }), SUCCESS;
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream) {
    char *there = alias(from, bytes);
    if (!there) return INVALID_VALUE;
    return of(stream)->push([=] { memcpy(to, there, bytes); }), SUCCESS;
}

int cuStreamCreateWithPriority(void **stream, unsigned, int) { return *stream = make_stream(), SUCCESS; }
int cuStreamCreate(void **stream, unsigned) { return *stream = make_stream(), SUCCESS; }
// What it still has to do is done all the same, so that it is never freed.
int cuStreamDestroy_v2(void *) { return SUCCESS; }
int cuStreamIsCapturing(void *, int *status) { return *status = 0, SUCCESS; }
int cuStreamSynchronize(void *stream) {
    auto moment = std::make_shared<Moment>();
    of(stream)->push([=] { moment->end(); });
    return moment->wait(), SUCCESS;
}
int cuStreamWaitEvent(void *stream, void *event, unsigned) {
    auto last = ((Event *)event)->last;
    if (last) of(stream)->push([=] { last->wait(); });
    return SUCCESS;
}
int cuLaunchHostFunc(void *stream, void (*function)(void *), void *argument) {
    return of(stream)->push([=] { function(argument); }), SUCCESS;
}

int cuEventCreate(void **event, unsigned) { return *event = new Event, SUCCESS; }
int cuEventDestroy_v2(void *event) { return delete (Event *)event, SUCCESS; }
int cuEventRecord(void *event, void *stream) {
    auto moment = std::make_shared<Moment>();
    ((Event *)event)->last = moment;
    return of(stream)->push([=] { moment->end(); }), SUCCESS;
}
int cuEventQuery(void *event) {
    auto last = ((Event *)event)->last;
    return !last || last->is_over() ? SUCCESS : NOT_READY;
}
int cuEventSynchronize(void *event) {
    auto last = ((Event *)event)->last;
    if (last) last->wait();
    return SUCCESS;
}
}
