// A stand-in for libcuda.so.1, so that what Carole asks of the driver runs where there is no device: contexts, streams,
// events and memory, and no kernels. Streams run on threads of their own and dawdle at random, so that who does not
// wait finds the wrong bytes. Device memory cannot be touched by the host: its addresses are mapped without access,
// and the streams' threads reach the bytes elsewhere.
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_READY = 600 };

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
};

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

extern "C" {
int cuInit(unsigned) { return SUCCESS; }
int cuDriverGetVersion(int *version) { return *version = 13000, SUCCESS; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal == 0 ? SUCCESS : INVALID_VALUE; }
int cuDeviceGetAttribute(int *value, int, int) { return *value = 4, SUCCESS; }
int cuDevicePrimaryCtxRetain(void **context, int) { return *context = (void *)1, SUCCESS; }
int cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
int cuCtxPushCurrent_v2(void *) { return SUCCESS; }
int cuCtxPopCurrent_v2(void **context) { return *context = (void *)1, SUCCESS; }
int cuCtxGetStreamPriorityRange(int *least, int *greatest) { return *least = *greatest = 0, SUCCESS; }

int cuPointerGetAttribute(void *value, int attribute, uint64_t address) {
    if (!alias(address, 0)) return INVALID_VALUE;
    switch (attribute) {
    case 2: return *(unsigned *)value = 2, SUCCESS; // CU_POINTER_ATTRIBUTE_MEMORY_TYPE: the device's
    case 9: return *(int *)value = 0, SUCCESS;      // CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    default: return INVALID_VALUE;
    }
}

int cuMemAlloc_v2(uint64_t *address, size_t bytes) {
    size_t len = (bytes + 4095) & ~(size_t)4095;
    int memory = memfd_create("device", MFD_CLOEXEC);
    if (memory < 0 || ftruncate(memory, len)) return OUT_OF_MEMORY;
    void *token = mmap(nullptr, len, PROT_NONE, MAP_SHARED, memory, 0);
    void *bytes_at = mmap(nullptr, len, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    close(memory);
    if (token == MAP_FAILED || bytes_at == MAP_FAILED) return OUT_OF_MEMORY;
    std::lock_guard<std::mutex> lock(blocks_mutex);
    blocks[(uint64_t)token] = {(char *)bytes_at, len};
    return *address = (uint64_t)token, SUCCESS;
}

int cuMemFree_v2(uint64_t address) {
    settle();
    std::lock_guard<std::mutex> lock(blocks_mutex);
    auto found = blocks.find(address);
    if (found == blocks.end()) return INVALID_VALUE;
    munmap((void *)address, found->second.len);
    munmap(found->second.alias, found->second.len);
    blocks.erase(found);
    return SUCCESS;
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
