/* carole.h: collective communication for distributed training, from C99 and C++.
 *
 * Generated from bindings/c/src by cbindgen; do not edit. After a change of the sources:
 *   CAROLE_HEADER=write cargo test -p carole-c --test header
 *
 * Every function that can fail returns CAROLE_OK or one of the codes below; the words are in
 * carole_last_error() and the rank at fault, where it is known, in carole_last_culprit(), both per thread.
 * Unless a function says otherwise, it may be called from any thread at any time, also from several threads
 * at once. Nothing is printed unless CAROLE_LOG_LEVEL asks for it.
 *
 * A buffer that was submitted is the engine's until carole_wait or carole_poll reports an outcome; after any
 * outcome, errors included, nothing of Carole's touches it.
 */


#ifndef CAROLE_H
#define CAROLE_H

#include <stddef.h>
#include <stdint.h>
/* Fills a struct of options with its defaults and its size:
 *   carole_options options;
 *   CAROLE_OPTIONS_INIT(options);
 */
#define CAROLE_OPTIONS_INIT(options) carole_options_init(&(options), sizeof(options))


/*
 The version of this interface; `carole_abi_version()` tells the library's. Within one major version (the
 number in the SONAME) functions and fields are only added.
 */
#define CAROLE_ABI_VERSION 1

/*
 The call succeeded.
 */
#define CAROLE_OK 0

/*
 Fix the program: this call can never work. Nothing was sent.
 */
#define CAROLE_ERROR_USAGE 1

/*
 Fix the tensor: ranks disagree about it. The group goes on.
 */
#define CAROLE_ERROR_MISMATCH 2

/*
 A rank failed; carole_reform() goes on with the others. carole_last_culprit() tells which.
 */
#define CAROLE_ERROR_BROKEN 3

/*
 The job is over: this rank or another has shut down in an orderly way.
 */
#define CAROLE_ERROR_SHUTDOWN 4

/*
 The time allowed is over; the operation stays in flight and can be waited for again.
 */
#define CAROLE_ERROR_TIMEOUT 5

/*
 A defect of Carole; please report the words of carole_last_error().
 */
#define CAROLE_ERROR_INTERNAL 6

/*
 8-bit unsigned.
 */
#define CAROLE_UINT8 0

/*
 8-bit signed.
 */
#define CAROLE_INT8 1

/*
 16-bit unsigned.
 */
#define CAROLE_UINT16 2

/*
 16-bit signed.
 */
#define CAROLE_INT16 3

/*
 32-bit signed.
 */
#define CAROLE_INT32 4

/*
 64-bit signed.
 */
#define CAROLE_INT64 5

/*
 IEEE half precision; summed in 32 bits.
 */
#define CAROLE_FLOAT16 6

/*
 IEEE single precision.
 */
#define CAROLE_FLOAT32 7

/*
 IEEE double precision.
 */
#define CAROLE_FLOAT64 8

/*
 One byte, 0 or 1.
 */
#define CAROLE_BOOL 9

/*
 bfloat16; summed in 32 bits.
 */
#define CAROLE_BFLOAT16 10

/*
 32-bit unsigned.
 */
#define CAROLE_UINT32 11

/*
 64-bit unsigned.
 */
#define CAROLE_UINT64 12

/*
 Two 32-bit floats: real, imaginary.
 */
#define CAROLE_COMPLEX64 13

/*
 Two 64-bit floats: real, imaginary.
 */
#define CAROLE_COMPLEX128 14

/*
 Sum divided by the number of ranks, rounded once; floor division for integers.
 */
#define CAROLE_AVERAGE 0

/*
 Sum; integers wrap, bool is *or*.
 */
#define CAROLE_SUM 1

/*
 Adaptive summation of gradients.
 */
#define CAROLE_ADASUM 2

/*
 Smallest; NaN propagates.
 */
#define CAROLE_MIN 3

/*
 Largest; NaN propagates.
 */
#define CAROLE_MAX 4

/*
 Product; integers wrap, bool is *and*.
 */
#define CAROLE_PRODUCT 5

/*
 Bitwise and, of integers and bool.
 */
#define CAROLE_BITAND 6

/*
 Bitwise or, of integers and bool.
 */
#define CAROLE_BITOR 7

/*
 Every rank gets the reduction of all inputs.
 */
#define CAROLE_ALLREDUCE 0

/*
 Every rank gets all inputs, joined along the first dimension, which may differ.
 */
#define CAROLE_ALLGATHER 1

/*
 Every rank gets the root's tensor.
 */
#define CAROLE_BROADCAST 2

/*
 Every rank gets its rows of the reduction; the lower ranks get one row more.
 */
#define CAROLE_REDUCESCATTER 3

/*
 Rank j gets the j-th split of every rank's rows.
 */
#define CAROLE_ALLTOALL 4

/*
 The root gets the reduction.
 */
#define CAROLE_REDUCE 5

/*
 The root gets all inputs, joined along the first dimension.
 */
#define CAROLE_GATHER 6

/*
 Every rank gets its rows of the root's tensor; the lower ranks get one row more.
 */
#define CAROLE_SCATTER 7

/*
 No rank leaves before all have entered.
 */
#define CAROLE_BARRIER 8

/*
 This rank has no more data; what the others still run goes on with the identity in its place.
 */
#define CAROLE_JOIN 9

/*
 Average divides by the size of the process set.
 */
#define CAROLE_JOIN_AVERAGE_SIZE 0

/*
 Average divides by the number of ranks that have not joined.
 */
#define CAROLE_JOIN_AVERAGE_PRESENT 1

/*
 Tensors are in the host's memory.
 */
#define CAROLE_MEMORY_HOST 0

/*
 All tensors of a call are on one CUDA device.
 */
#define CAROLE_MEMORY_CUDA 1

/*
 The process set of all ranks.
 */
#define CAROLE_GLOBAL_SET 0

/*
 Wait without a limit.
 */
#define CAROLE_FOREVER -1

/*
 What an operation produced. Reading it from several threads at once is safe; freeing it while another
 thread reads is not.
 */
typedef struct carole_output carole_output;

/*
 A collective that was planned once and can be started many times.
 */
typedef struct carole_persistent carole_persistent;

/*
 How an operation is to be done. Fill it with CAROLE_OPTIONS_INIT, then set what differs.
 */
typedef struct {
  /*
   sizeof(carole_options).
   */
  size_t struct_size;
  /*
   The name by which ranks match their operations (UTF-8); NULL matches by order of submission, which is
   not safe from several threads at once.
   */
  const char *name;
  /*
   Factor before the reduction; 1 by default.
   */
  double prescale;
  /*
   Factor after the reduction; 1 by default.
   */
  double postscale;
  /*
   The process set; CAROLE_GLOBAL_SET by default.
   */
  uint32_t process_set;
  /*
   CAROLE_SUM (the default), CAROLE_AVERAGE and so on; ignored where nothing is reduced.
   */
  uint32_t op;
  /*
   The root as a global rank, for broadcast, reduce, gather and scatter; 0 by default.
   */
  uint32_t root;
  /*
   How Average counts ranks that have joined: CAROLE_JOIN_AVERAGE_SIZE by default.
   */
  uint32_t join_average;
  /*
   Where the tensors lie: CAROLE_MEMORY_HOST by default.
   */
  uint32_t memory;
  /*
   With CAROLE_MEMORY_CUDA: the stream (a CUstream or cudaStream_t) that has been given what makes the inputs; NULL
   is the default stream. The call does not wait for it. Outputs that Carole allocates lie on the device, too, and
   waiting for the operation waits for the device.
   */
  void *cuda_stream;
} carole_options;

/*
 One tensor of an operation. Its layout is fixed within a major version, since arrays of it cross.
 */
typedef struct {
  /*
   The first byte of the input (rows one after another). May be NULL when there are no bytes.
   */
  const void *input;
  /*
   Where the output goes: `input` itself for in place, or NULL to let the engine allocate it and hand it
   over in the output. For allgather, alltoall and gather NULL is the only choice, since the size is
   known only after the ranks have agreed.
   */
  void *output;
  /*
   Element type: CAROLE_FLOAT32 and so on.
   */
  uint32_t dtype;
  /*
   How many dimensions `shape` has; 0 for a scalar.
   */
  uint32_t dimensions;
  /*
   Dimensions of the input. May be NULL when `dimensions` is 0.
   */
  const uint64_t *shape;
} carole_tensor;

/*
 One knob and its value, before every other source: {"CAROLE_ALGORITHM", "ring"}.
 */
typedef struct {
  /*
   Its name.
   */
  const char *name;
  /*
   Its value.
   */
  const char *value;
} carole_knob;

/*
 A list of ranks.
 */
typedef struct {
  /*
   The ranks.
   */
  const uint32_t *ranks;
  /*
   How many.
   */
  size_t count;
} carole_ranks;

/*
 How to start. All zero but `struct_size` means: everything from the environment.
 */
typedef struct {
  /*
   sizeof(carole_init_options).
   */
  size_t struct_size;
  /*
   Knobs that go before every other source. May be NULL when there are none.
   */
  const carole_knob *knobs;
  /*
   How many knobs.
   */
  size_t knob_count;
  /*
   Process sets to make at once, the same on every rank. May be NULL when there are none.
   */
  const carole_ranks *process_sets;
  /*
   How many process sets.
   */
  size_t process_set_count;
} carole_init_options;

/*
 Who this process is.
 */
typedef struct {
  /*
   sizeof(carole_world); set it before the call.
   */
  size_t struct_size;
  /*
   This process, among all.
   */
  uint32_t rank;
  /*
   All processes.
   */
  uint32_t size;
  /*
   This process, among those on its host.
   */
  uint32_t local_rank;
  /*
   Processes on its host.
   */
  uint32_t local_size;
  /*
   Its host, among the hosts that have this local rank.
   */
  uint32_t cross_rank;
  /*
   Hosts that have this local rank.
   */
  uint32_t cross_size;
  /*
   1 when all hosts have equally many processes, else 0.
   */
  uint32_t homogeneous;
} carole_world;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/*
 Fills a struct of options with its defaults and its size. CAROLE_OPTIONS_INIT calls it.

 # Safety
 `options` holds `struct_size` bytes that can be written.
 */
int32_t carole_options_init(carole_options *options, size_t struct_size);

/*
 Every rank gets the reduction of all inputs.
 Waits for the end. `tensors` is one tensor or a group, which completes or fails as a unit. `options` may
 be NULL for the defaults. `output` may be NULL when every tensor has a place for its output; else it gets
 what carole_output_free must be called on.

 # Safety
 `tensors` holds `count` elements whose pointers are valid; `options` and `output` are NULL or valid.
 */
int32_t carole_allreduce(const carole_tensor *tensors,
                         size_t count,
                         const carole_options *options,
                         carole_output **output);

/*
 As carole_allreduce, but returns at once with a handle, to be given to carole_wait or carole_release. The
 buffers are the engine's until there is an outcome.

 # Safety
 As carole_allreduce, until there is an outcome; `handle` can be written.
 */
int32_t carole_allreduce_async(const carole_tensor *tensors,
                               size_t count,
                               const carole_options *options,
                               uint64_t *handle);

/*
 Every rank gets all inputs, joined along the first dimension, which may differ.
 Waits for the end. `tensors` is one tensor or a group, which completes or fails as a unit. `options` may
 be NULL for the defaults. `output` may be NULL when every tensor has a place for its output; else it gets
 what carole_output_free must be called on.

 # Safety
 `tensors` holds `count` elements whose pointers are valid; `options` and `output` are NULL or valid.
 */
int32_t carole_allgather(const carole_tensor *tensors,
                         size_t count,
                         const carole_options *options,
                         carole_output **output);

/*
 As carole_allgather, but returns at once with a handle, to be given to carole_wait or carole_release. The
 buffers are the engine's until there is an outcome.

 # Safety
 As carole_allgather, until there is an outcome; `handle` can be written.
 */
int32_t carole_allgather_async(const carole_tensor *tensors,
                               size_t count,
                               const carole_options *options,
                               uint64_t *handle);

/*
 Every rank gets the root's tensor; all ranks give the same shape.
 Waits for the end. `tensors` is one tensor or a group, which completes or fails as a unit. `options` may
 be NULL for the defaults. `output` may be NULL when every tensor has a place for its output; else it gets
 what carole_output_free must be called on.

 # Safety
 `tensors` holds `count` elements whose pointers are valid; `options` and `output` are NULL or valid.
 */
int32_t carole_broadcast(const carole_tensor *tensors,
                         size_t count,
                         const carole_options *options,
                         carole_output **output);

/*
 As carole_broadcast, but returns at once with a handle, to be given to carole_wait or carole_release. The
 buffers are the engine's until there is an outcome.

 # Safety
 As carole_broadcast, until there is an outcome; `handle` can be written.
 */
int32_t carole_broadcast_async(const carole_tensor *tensors,
                               size_t count,
                               const carole_options *options,
                               uint64_t *handle);

/*
 Every rank gets its rows of the reduction; the lower ranks get one row more.
 Waits for the end. `tensors` is one tensor or a group, which completes or fails as a unit. `options` may
 be NULL for the defaults. `output` may be NULL when every tensor has a place for its output; else it gets
 what carole_output_free must be called on.

 # Safety
 `tensors` holds `count` elements whose pointers are valid; `options` and `output` are NULL or valid.
 */
int32_t carole_reducescatter(const carole_tensor *tensors,
                             size_t count,
                             const carole_options *options,
                             carole_output **output);

/*
 As carole_reducescatter, but returns at once with a handle, to be given to carole_wait or carole_release. The
 buffers are the engine's until there is an outcome.

 # Safety
 As carole_reducescatter, until there is an outcome; `handle` can be written.
 */
int32_t carole_reducescatter_async(const carole_tensor *tensors,
                                   size_t count,
                                   const carole_options *options,
                                   uint64_t *handle);

/*
 Rank j gets the j-th split of every rank's rows. `splits` holds the rows for each member, for each tensor
 one after another; `split_count` 0 means equal splits.
 Waits for the end. `tensors` is one tensor or a group, which completes or fails as a unit. `options` may
 be NULL for the defaults. `output` may be NULL when every tensor has a place for its output; else it gets
 what carole_output_free must be called on.

 # Safety
 `tensors` holds `count` elements whose pointers are valid; `options` and `output` are NULL or valid.
 */
int32_t carole_alltoall(const carole_tensor *tensors,
                        size_t count,
                        const uint64_t *splits,
                        size_t split_count,
                        const carole_options *options,
                        carole_output **output);

/*
 As carole_alltoall, but returns at once with a handle, to be given to carole_wait or carole_release. The
 buffers are the engine's until there is an outcome.

 # Safety
 As carole_alltoall, until there is an outcome; `handle` can be written.
 */
int32_t carole_alltoall_async(const carole_tensor *tensors,
                              size_t count,
                              const uint64_t *splits,
                              size_t split_count,
                              const carole_options *options,
                              uint64_t *handle);

/*
 The root gets the reduction.
 Waits for the end. `tensors` is one tensor or a group, which completes or fails as a unit. `options` may
 be NULL for the defaults. `output` may be NULL when every tensor has a place for its output; else it gets
 what carole_output_free must be called on.

 # Safety
 `tensors` holds `count` elements whose pointers are valid; `options` and `output` are NULL or valid.
 */
int32_t carole_reduce(const carole_tensor *tensors,
                      size_t count,
                      const carole_options *options,
                      carole_output **output);

/*
 As carole_reduce, but returns at once with a handle, to be given to carole_wait or carole_release. The
 buffers are the engine's until there is an outcome.

 # Safety
 As carole_reduce, until there is an outcome; `handle` can be written.
 */
int32_t carole_reduce_async(const carole_tensor *tensors,
                            size_t count,
                            const carole_options *options,
                            uint64_t *handle);

/*
 The root gets all inputs, joined along the first dimension, which may differ.
 Waits for the end. `tensors` is one tensor or a group, which completes or fails as a unit. `options` may
 be NULL for the defaults. `output` may be NULL when every tensor has a place for its output; else it gets
 what carole_output_free must be called on.

 # Safety
 `tensors` holds `count` elements whose pointers are valid; `options` and `output` are NULL or valid.
 */
int32_t carole_gather(const carole_tensor *tensors,
                      size_t count,
                      const carole_options *options,
                      carole_output **output);

/*
 As carole_gather, but returns at once with a handle, to be given to carole_wait or carole_release. The
 buffers are the engine's until there is an outcome.

 # Safety
 As carole_gather, until there is an outcome; `handle` can be written.
 */
int32_t carole_gather_async(const carole_tensor *tensors,
                            size_t count,
                            const carole_options *options,
                            uint64_t *handle);

/*
 Every rank gets its rows of the root's tensor; the lower ranks get one row more. All ranks give the root's
 shape; only the root's input is read.
 Waits for the end. `tensors` is one tensor or a group, which completes or fails as a unit. `options` may
 be NULL for the defaults. `output` may be NULL when every tensor has a place for its output; else it gets
 what carole_output_free must be called on.

 # Safety
 `tensors` holds `count` elements whose pointers are valid; `options` and `output` are NULL or valid.
 */
int32_t carole_scatter(const carole_tensor *tensors,
                       size_t count,
                       const carole_options *options,
                       carole_output **output);

/*
 As carole_scatter, but returns at once with a handle, to be given to carole_wait or carole_release. The
 buffers are the engine's until there is an outcome.

 # Safety
 As carole_scatter, until there is an outcome; `handle` can be written.
 */
int32_t carole_scatter_async(const carole_tensor *tensors,
                             size_t count,
                             const carole_options *options,
                             uint64_t *handle);

/*
 No rank leaves before all members of the process set have entered. Of `options`, which may be NULL, the
 name and the process set count.

 # Safety
 `options` is NULL or valid.
 */
int32_t carole_barrier(const carole_options *options);

/*
 As carole_barrier, but returns at once with a handle.

 # Safety
 `options` is NULL or valid; `handle` can be written.
 */
int32_t carole_barrier_async(const carole_options *options, uint64_t *handle);

/*
 Says that this rank has no more data. What the others still run goes on with the identity of each
 operation in its place; returns when all members have joined. `last` (may be NULL) gets the last rank to
 join. Of `options`, which may be NULL, the process set counts.

 # Safety
 `options` is NULL or valid; `last` is NULL or can be written.
 */
int32_t carole_join(const carole_options *options, int64_t *last);

/*
 As carole_join, but returns at once with a handle; carole_output_last_joined tells the last rank.

 # Safety
 `options` is NULL or valid; `handle` can be written.
 */
int32_t carole_join_async(const carole_options *options, uint64_t *handle);

/*
 Any of the collectives by its code (CAROLE_ALLREDUCE and so on), for programs that choose at run time.
 `splits` is for alltoall only.

 # Safety
 As carole_allreduce_async; `splits` holds `split_count` elements.
 */
int32_t carole_submit(uint32_t collective,
                      const carole_tensor *tensors,
                      size_t count,
                      const uint64_t *splits,
                      size_t split_count,
                      const carole_options *options,
                      uint64_t *handle);

/*
 Sets `done` to 1 when the operation has an outcome, which carole_wait then gives at once, else to 0. Never
 blocks. The handle stays valid.

 # Safety
 `done` can be written.
 */
int32_t carole_poll(uint64_t handle, int32_t *done);

/*
 Waits for an operation and uses its handle up; after CAROLE_ERROR_TIMEOUT the handle is as before.
 `timeout_ms` may be CAROLE_FOREVER (any negative number). `output` may be NULL when it is not wanted.
 Waiting for one handle on two threads at once is an error on one of them.

 # Safety
 `output` is NULL or can be written.
 */
int32_t carole_wait(uint64_t handle, int64_t timeout_ms, carole_output **output);

/*
 Gives a handle up: the operation finishes by itself and its output is dropped. Its buffers stay the
 engine's until it has; a program that must know when waits instead.
 */
int32_t carole_release(uint64_t handle);

/*
 Sends the input of a tensor to a rank, to be met by carole_recv there with the same process set, tag, type
 and size. Returns when the bytes may be overwritten.

 # Safety
 `tensor` is valid.
 */
int32_t carole_send(uint32_t to, uint32_t tag, const carole_tensor *tensor, uint32_t process_set);

/*
 As carole_send, but returns at once with a handle.

 # Safety
 `tensor` is valid until there is an outcome; `handle` can be written.
 */
int32_t carole_send_async(uint32_t to,
                          uint32_t tag,
                          const carole_tensor *tensor,
                          uint32_t process_set,
                          uint64_t *handle);

/*
 Receives into the output of a tensor what a rank sends with this tag; the shape tells how much.

 # Safety
 `tensor` is valid.
 */
int32_t carole_recv(uint32_t from, uint32_t tag, const carole_tensor *tensor, uint32_t process_set);

/*
 As carole_recv, but returns at once with a handle.

 # Safety
 `tensor` is valid until there is an outcome; `handle` can be written.
 */
int32_t carole_recv_async(uint32_t from,
                          uint32_t tag,
                          const carole_tensor *tensor,
                          uint32_t process_set,
                          uint64_t *handle);

/*
 As carole_recv, from whichever rank of the process set sends with this tag; `source` (may be NULL) gets the rank.

 # Safety
 `tensor` is valid; `source` is NULL or can be written.
 */
int32_t carole_recv_any(uint32_t tag,
                        const carole_tensor *tensor,
                        uint32_t process_set,
                        int64_t *source);

/*
 As carole_recv_any, but returns at once with a handle; carole_output_source tells the rank. Receives of one tag, from
 any rank or from one, take messages in the order in which they were started.

 # Safety
 `tensor` is valid until there is an outcome; `handle` can be written.
 */
int32_t carole_recv_any_async(uint32_t tag,
                              const carole_tensor *tensor,
                              uint32_t process_set,
                              uint64_t *handle);

/*
 How many tensors there are; 0 for barrier and join, on members that get no result, and for NULL.

 # Safety
 `output` is NULL or was given by Carole and not freed.
 */
size_t carole_output_count(const carole_output *output);

/*
 The element type of a tensor; UINT32_MAX where there is no such tensor.

 # Safety
 `output` is NULL or was given by Carole and not freed.
 */
uint32_t carole_output_dtype(const carole_output *output, size_t index);

/*
 The number of dimensions of a tensor; 0 where there is no such tensor.

 # Safety
 `output` is NULL or was given by Carole and not freed.
 */
uint32_t carole_output_dimensions(const carole_output *output, size_t index);

/*
 The dimensions of a tensor, valid until the output is freed; NULL where there is no such tensor or it is a
 scalar.

 # Safety
 `output` is NULL or was given by Carole and not freed.
 */
const uint64_t *carole_output_shape(const carole_output *output, size_t index);

/*
 The bytes of a tensor, aligned to 64, writable and valid until the output is freed; memory of the device where the
 inputs were on one. NULL where there is no such tensor, and where the caller gave the place: then the bytes are there.

 # Safety
 `output` is NULL or was given by Carole and not freed.
 */
void *carole_output_data(const carole_output *output,
                         size_t index);

/*
 How many bytes a tensor has; 0 where there is no such tensor.

 # Safety
 `output` is NULL or was given by Carole and not freed.
 */
uint64_t carole_output_bytes(const carole_output *output, size_t index);

/*
 Alltoall: the rows received from each member, for each tensor one after another; `count` (may be NULL)
 gets their number. NULL where there are none. Valid until the output is freed.

 # Safety
 `output` is NULL or was given by Carole and not freed; `count` is NULL or can be written.
 */
const uint64_t *carole_output_received_splits(const carole_output *output, size_t *count);

/*
 Receive: the rank that has sent the message; -1 where this was no receive.

 # Safety
 `output` is NULL or was given by Carole and not freed.
 */
int64_t carole_output_source(const carole_output *output);

/*
 Join: the last rank to join; -1 where this was no join.

 # Safety
 `output` is NULL or was given by Carole and not freed.
 */
int64_t carole_output_last_joined(const carole_output *output);

/*
 Frees an output and its bytes. NULL is fine. Nothing of it may be used afterwards, on any thread.

 # Safety
 `output` is NULL or was given by Carole and not freed before.
 */
void carole_output_free(carole_output *output);

/*
 Plans a collective by its code (CAROLE_ALLREDUCE and so on), and waits until all members of its process set have
 planned the same; matched by its name, or by order. The tensors stay where they are until carole_persistent_free:
 every start reads the inputs anew and writes the outputs. They are in the host's memory; `splits` is for alltoall
 only. Nothing is agreed on at a start, so within a host it is much faster than carole_submit.

 # Safety
 As carole_submit, for as long as the plan lives; `persistent` can be written.
 */
int32_t carole_plan(uint32_t collective,
                    const carole_tensor *tensors,
                    size_t count,
                    const uint64_t *splits,
                    size_t split_count,
                    const carole_options *options,
                    carole_persistent **persistent);

/*
 Starts a plan. Never blocks. All members start it equally often, and wait for it before they start it again.

 # Safety
 `persistent` was given by Carole and not freed; its inputs are not written and its outputs not touched until
 carole_persistent_wait has returned other than CAROLE_ERROR_TIMEOUT.
 */
int32_t carole_persistent_start(carole_persistent *persistent);

/*
 Starts a plan and waits for it.

 # Safety
 As carole_persistent_start.
 */
int32_t carole_persistent_run(carole_persistent *persistent);

/*
 Sets `done` to 1 when the last start is over, else to 0. Never blocks.

 # Safety
 `persistent` was given by Carole and not freed; `done` can be written.
 */
int32_t carole_persistent_poll(carole_persistent *persistent, int32_t *done);

/*
 Waits for the last start; without one there is nothing to wait for. `timeout_ms` may be CAROLE_FOREVER (any negative
 number); after CAROLE_ERROR_TIMEOUT it goes on and can be waited for again.

 # Safety
 `persistent` was given by Carole and not freed.
 */
int32_t carole_persistent_wait(carole_persistent *persistent,
                               int64_t timeout_ms);

/*
 The bytes of an output that Carole has allocated, aligned to 64, the same at every start and valid until the plan is
 freed; NULL where there is no such output, and where the caller gave the place: then the bytes are there.

 # Safety
 `persistent` is NULL or was given by Carole and not freed.
 */
void *carole_persistent_data(const carole_persistent *persistent,
                             size_t index);

/*
 How many bytes an output has; 0 where there is no such output.

 # Safety
 `persistent` is NULL or was given by Carole and not freed.
 */
uint64_t carole_persistent_bytes(const carole_persistent *persistent, size_t index);

/*
 Gives a plan up; its tensors are the caller's again. What is under way is waited for. NULL is fine. A rank has to do
 so with all its plans before carole_join.

 # Safety
 `persistent` is NULL or was given by Carole and not freed before.
 */
int32_t carole_persistent_free(carole_persistent *persistent);

/*
 Makes a process set of these ranks and gives its number. Collective over all ranks, which must name the
 same ranks; waits for their agreement.

 # Safety
 `ranks` holds `count` elements; `process_set` can be written.
 */
int32_t carole_add_process_set(const uint32_t *ranks, size_t count, uint32_t *process_set);

/*
 Ends a process set. Collective over all ranks. `removed` (may be NULL) gets 1, or 0 for the set of all
 ranks and for sets that do not exist.

 # Safety
 `removed` is NULL or can be written.
 */
int32_t carole_remove_process_set(uint32_t process_set, int32_t *removed);

/*
 The number of ranks in a process set; -1 (and a last error) where it does not exist.
 */
int64_t carole_process_set_size(uint32_t process_set);

/*
 This rank's position in a process set; -1 where it is no member (with no error) or the set does not exist
 (with a last error).
 */
int64_t carole_process_set_rank(uint32_t process_set);

/*
 Writes up to `capacity` ranks of a process set, ascending, and tells in `count` how many there are.

 # Safety
 `ranks` has room for `capacity` elements (may be NULL when that is 0); `count` can be written.
 */
int32_t carole_process_set_ranks(uint32_t process_set, uint32_t *ranks, size_t capacity, size_t *count);

/*
 Writes up to `capacity` numbers of process sets, that of all ranks first, and tells in `count` how many
 there are.

 # Safety
 `process_sets` has room for `capacity` elements (may be NULL when that is 0); `count` can be written.
 */
int32_t carole_process_sets(uint32_t *process_sets, size_t capacity, size_t *count);

/*
 Allocates `bytes` zeroed bytes for tensors, in memory that the ranks of this host share: an allreduce of at least
 64 KiB whose tensors and outputs lie there on all ranks is done where they lie, without a copy. Ordinary memory where
 ranks share none. It can be used until carole_deallocate, after carole_shutdown too; a forked child shares it.

 # Safety
 `memory` can be written.
 */
int32_t carole_allocate(uint64_t bytes,
                        void **memory);

/*
 Gives memory of carole_allocate back. NULL is fine.

 # Safety
 No operation or plan that uses it is under way, and nobody touches it any more.
 */
int32_t carole_deallocate(void *memory);

/*
 The error of the last call on this thread that failed, in words, as UTF-8; an empty string when none has.
 The pointer is valid until the next failing call on this thread or its end. Never NULL.
 */
const char *carole_last_error(void);

/*
 The rank at fault in the error of carole_last_error(), or -1 where there is none or it is not known.
 */
int64_t carole_last_culprit(void);

/*
 The version of the interface that this library offers; compare it with CAROLE_ABI_VERSION.
 */
uint32_t carole_abi_version(void);

/*
 The version of the library, "0.1.0" say.
 */
const char *carole_version(void);

/*
 Joins the job, or starts one of size 1 when no variables are set. `options` may be NULL: everything then
 comes from the environment. Does nothing when called again with the same options. Waits until all ranks
 have come. Calls of carole_init and carole_shutdown from several threads are taken one after another.

 # Safety
 `options` is NULL or as its declaration says.
 */
int32_t carole_init(const carole_init_options *options);

/*
 Says goodbye and leaves; bounded in time. Operations in flight end with CAROLE_ERROR_SHUTDOWN. carole_init
 may be called again afterwards, any number of times.
 */
int32_t carole_shutdown(void);

/*
 Forms the next epoch with the ranks that are left: after a call has failed with CAROLE_ERROR_BROKEN, or whenever
 all ranks call it. No process is restarted. Ranks keep their order and count from 0 again, process sets keep
 their numbers and lose the members that are gone (a set that has lost all is gone, too), and in an elastic job
 processes that wait to be let in come last; carole_get_world tells the new place. Operations in flight have
 ended with an error. Waits for ranks that live, up to CAROLE_ELASTIC_TIMEOUT_S. CAROLE_ERROR_BROKEN means that this
 process must not go on: the others have gone on without it, or too few came together. After any error it is in
 no job. Taken in turn with carole_init and carole_shutdown.
 */
int32_t carole_reform(void);

/*
 The number of the present epoch: how often the ranks have come together before; -1 when not initialized.
 */
int64_t carole_epoch(void);

/*
 1 when carole_init has succeeded and carole_shutdown has not been called since, else 0.
 */
int32_t carole_is_initialized(void);

/*
 Fills in who this process is. Set `struct_size` before the call.

 # Safety
 `world` points to a struct of at least `struct_size` bytes that can be written.
 */
int32_t carole_get_world(carole_world *world);

/*
 This process, among all; -1 (and a last error) before carole_init.
 */
int64_t carole_rank(void);

/*
 All processes; -1 before carole_init.
 */
int64_t carole_size(void);

/*
 This process, among those on its host; -1 before carole_init.
 */
int64_t carole_local_rank(void);

/*
 Processes on this host; -1 before carole_init.
 */
int64_t carole_local_size(void);

/*
 This host, among those that have this local rank; -1 before carole_init.
 */
int64_t carole_cross_rank(void);

/*
 Hosts that have this local rank; -1 before carole_init.
 */
int64_t carole_cross_size(void);

/*
 1 when all hosts have equally many processes, else 0; -1 before carole_init.
 */
int64_t carole_is_homogeneous(void);

/*
 Bytes of one element of this type; 0 for a code that is no type.
 */
size_t carole_dtype_size(uint32_t dtype);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* CAROLE_H */
