/* Every call of carole.h, on any number of ranks. Compiles as C99 and as C++. Ends with 0 when all is right,
 * with 1 and words about each wrong thing when not. */
#include <carole.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures = 0;
static int me, size;

#define EXPECT(condition)                                                                                    \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            failures++;                                                                                      \
            fprintf(stderr, "rank %d, line %d: not true: %s (last error: %s)\n", me, __LINE__, #condition,   \
                    carole_last_error());                                                                    \
        }                                                                                                    \
    } while (0)
#define OK(call) EXPECT((call) == CAROLE_OK)

static carole_tensor vector(const void *input, void *output, uint32_t dtype, const uint64_t *shape) {
    carole_tensor tensor;
    tensor.input = input;
    tensor.output = output;
    tensor.dtype = dtype;
    tensor.dimensions = 1;
    tensor.shape = shape;
    return tensor;
}

static carole_options named(const char *name, uint32_t op) {
    carole_options options;
    CAROLE_OPTIONS_INIT(options);
    options.name = name;
    options.op = op;
    return options;
}

/* The sum of all ranks. */
static int rank_sum(void) { return size * (size - 1) / 2; }

static void before_init(void) {
    uint64_t shape[1] = {1};
    float x = 1;
    carole_tensor t = vector(&x, &x, CAROLE_FLOAT32, shape);
    EXPECT(carole_is_initialized() == 0);
    EXPECT(carole_rank() == -1);
    EXPECT(carole_allreduce(&t, 1, NULL, NULL) == CAROLE_ERROR_USAGE);
    EXPECT(strlen(carole_last_error()) > 0);
    EXPECT(x == 1);
}

static void world(void) {
    carole_world w;
    w.struct_size = sizeof w;
    OK(carole_get_world(&w));
    EXPECT((int64_t)w.rank == carole_rank() && (int64_t)w.size == carole_size());
    EXPECT((int64_t)w.local_rank == carole_local_rank() && (int64_t)w.local_size == carole_local_size());
    EXPECT((int64_t)w.cross_rank == carole_cross_rank() && (int64_t)w.cross_size == carole_cross_size());
    EXPECT((int64_t)w.homogeneous == carole_is_homogeneous());
    w.struct_size = 0;
    EXPECT(carole_get_world(&w) == CAROLE_ERROR_USAGE);
    EXPECT(carole_dtype_size(CAROLE_COMPLEX128) == 16 && carole_dtype_size(99) == 0);
    OK(carole_init(NULL)); /* again, with the same options: nothing happens */
}

static void allreduce(void) {
    float in[5], out[5];
    int64_t whole[3];
    uint64_t shape[1] = {5}, three[1] = {3}, none[1] = {0};
    carole_options o = named("allreduce", CAROLE_SUM);
    carole_tensor t = vector(in, out, CAROLE_FLOAT32, shape), group[2];
    carole_output *output = NULL;
    uint64_t handle = 0;
    int i, done = 0;

    for (i = 0; i < 5; i++) in[i] = (float)(i + me);
    OK(carole_allreduce(&t, 1, &o, NULL));
    for (i = 0; i < 5; i++) EXPECT(out[i] == (float)(size * i + rank_sum()));
    for (i = 0; i < 5; i++) EXPECT(in[i] == (float)(i + me));

    /* Scaled, and into memory of the engine's. */
    o.name = "allreduce.scaled";
    o.prescale = 2;
    o.postscale = 0.5;
    t.output = NULL;
    OK(carole_allreduce(&t, 1, &o, &output));
    EXPECT(carole_output_count(output) == 1 && carole_output_dtype(output, 0) == CAROLE_FLOAT32);
    EXPECT(carole_output_dimensions(output, 0) == 1 && carole_output_shape(output, 0)[0] == 5);
    EXPECT(carole_output_bytes(output, 0) == 20 && carole_output_data(output, 1) == NULL);
    if (carole_output_data(output, 0) != NULL) {
        for (i = 0; i < 5; i++) {
            EXPECT(((float *)carole_output_data(output, 0))[i] == (float)(size * i + rank_sum()));
        }
    } else {
        EXPECT(!"the engine allocates where no place is given");
    }
    carole_output_free(output);

    /* A group of two types, in place, as a handle. */
    for (i = 0; i < 3; i++) whole[i] = me - i;
    group[0] = vector(in, in, CAROLE_FLOAT32, shape);
    group[1] = vector(whole, whole, CAROLE_INT64, three);
    o = named("allreduce.group", CAROLE_MAX);
    OK(carole_allreduce_async(group, 2, &o, &handle));
    OK(carole_poll(handle, &done));
    OK(carole_wait(handle, CAROLE_FOREVER, NULL));
    for (i = 0; i < 5; i++) EXPECT(in[i] == (float)(i + size - 1));
    for (i = 0; i < 3; i++) EXPECT(whole[i] == size - 1 - i);
    EXPECT(carole_wait(handle, 0, NULL) == CAROLE_ERROR_USAGE); /* used up */
    EXPECT(carole_poll(handle, &done) == CAROLE_ERROR_USAGE);

    /* No elements at all; and a scalar, unnamed. */
    t = vector(NULL, NULL, CAROLE_FLOAT64, none);
    o = named("allreduce.empty", CAROLE_SUM);
    OK(carole_allreduce(&t, 1, &o, NULL));
    in[0] = 3;
    t = vector(in, in, CAROLE_FLOAT32, NULL);
    t.dimensions = 0;
    OK(carole_allreduce(&t, 1, NULL, NULL));
    EXPECT(in[0] == (float)(3 * size));
}

static void unequal_rows(void) {
    int32_t in[64];
    uint64_t rows = (uint64_t)(me % 3), shape[2], expected = 0;
    carole_options o = named("rows", CAROLE_SUM);
    carole_tensor t;
    carole_output *output = NULL;
    int r, i, at;

    for (i = 0; i < 64; i++) in[i] = 100 * me + i;
    shape[0] = rows;
    shape[1] = 2;
    t = vector(in, NULL, CAROLE_INT32, shape);
    t.dimensions = 2;
    for (r = 0; r < size; r++) expected += (uint64_t)(r % 3);

    o.name = "allgather";
    OK(carole_allgather(&t, 1, &o, &output));
    EXPECT(carole_output_dimensions(output, 0) == 2 && carole_output_shape(output, 0)[0] == expected);
    at = 0;
    for (r = 0; r < size; r++) {
        for (i = 0; i < 2 * (r % 3); i++) {
            EXPECT(((int32_t *)carole_output_data(output, 0))[at++] == 100 * r + i);
        }
    }
    carole_output_free(output);

    output = NULL;
    o.name = "gather";
    o.root = (uint32_t)(size - 1);
    OK(carole_gather(&t, 1, &o, &output));
    if (me == size - 1) {
        EXPECT(carole_output_count(output) == 1 && carole_output_shape(output, 0)[0] == expected);
        at = 0;
        for (r = 0; r < size; r++) {
            for (i = 0; i < 2 * (r % 3); i++) {
                EXPECT(((int32_t *)carole_output_data(output, 0))[at++] == 100 * r + i);
            }
        }
    }
    carole_output_free(output);
}

static void alltoall(void) {
    /* Rank r gives r + 1 elements to each rank. */
    int16_t in[1024];
    uint64_t splits[32], shape[1];
    size_t count = 0;
    carole_options o = named("alltoall", CAROLE_SUM);
    carole_tensor t;
    carole_output *output = NULL;
    int r, i, at = 0;

    for (r = 0; r < size; r++) {
        splits[r] = (uint64_t)(me + 1);
        for (i = 0; i < me + 1; i++) in[at++] = (int16_t)(100 * me + 10 * r + i);
    }
    shape[0] = (uint64_t)at;
    t = vector(in, NULL, CAROLE_INT16, shape);
    OK(carole_alltoall(&t, 1, splits, (size_t)size, &o, &output));
    EXPECT(carole_output_received_splits(output, &count) != NULL && count == (size_t)size);
    at = 0;
    for (r = 0; r < size; r++) {
        EXPECT(carole_output_received_splits(output, NULL)[r] == (uint64_t)(r + 1));
        for (i = 0; i < r + 1; i++) {
            EXPECT(((int16_t *)carole_output_data(output, 0))[at++] == (int16_t)(100 * r + 10 * me + i));
        }
    }
    carole_output_free(output);
}

static void rooted(void) {
    double in[7], out[7];
    uint64_t shape[1] = {7};
    carole_options o = named("broadcast", CAROLE_SUM);
    carole_tensor t = vector(in, in, CAROLE_FLOAT64, shape);
    carole_output *output = NULL;
    int i, root = size / 2, mine, first;

    for (i = 0; i < 7; i++) in[i] = i + 100 * me;
    o.root = (uint32_t)root;
    OK(carole_broadcast(&t, 1, &o, NULL));
    for (i = 0; i < 7; i++) EXPECT(in[i] == i + 100 * root);

    for (i = 0; i < 7; i++) in[i] = i + me;
    t.output = out;
    o.name = "reduce";
    OK(carole_reduce(&t, 1, &o, NULL));
    if (me == root) {
        for (i = 0; i < 7; i++) EXPECT(out[i] == size * i + rank_sum());
    }

    /* Seven rows over the ranks: the lower ones get one more. */
    mine = 7 / size + (me < 7 % size ? 1 : 0);
    first = me * (7 / size) + (me < 7 % size ? me : 7 % size);
    for (i = 0; i < 7; i++) in[i] = i + me;
    t.output = NULL;
    o.name = "scatter";
    OK(carole_scatter(&t, 1, &o, &output));
    EXPECT(carole_output_shape(output, 0)[0] == (uint64_t)mine);
    for (i = 0; i < mine; i++) EXPECT(((double *)carole_output_data(output, 0))[i] == first + i + root);
    carole_output_free(output);

    output = NULL;
    o.name = "reducescatter";
    OK(carole_reducescatter(&t, 1, &o, &output));
    EXPECT(carole_output_shape(output, 0)[0] == (uint64_t)mine);
    for (i = 0; i < mine; i++) {
        EXPECT(((double *)carole_output_data(output, 0))[i] == size * (first + i) + rank_sum());
    }
    carole_output_free(output);
}

static void messages(void) {
    uint8_t in[3] = {0, 0, 0}, out[3] = {0, 0, 0};
    uint64_t shape[1] = {3}, handle = 0;
    uint32_t next = (uint32_t)((me + 1) % size), previous = (uint32_t)((me + size - 1) % size);
    carole_tensor from = vector(in, NULL, CAROLE_UINT8, shape), to = vector(NULL, out, CAROLE_UINT8, shape);
    int i;

    if (size == 1) return;
    for (i = 0; i < 3; i++) in[i] = (uint8_t)(10 * me + i);
    OK(carole_recv_async(previous, 7, &to, CAROLE_GLOBAL_SET, &handle));
    OK(carole_send(next, 7, &from, CAROLE_GLOBAL_SET));
    OK(carole_wait(handle, CAROLE_FOREVER, NULL));
    for (i = 0; i < 3; i++) EXPECT(out[i] == (uint8_t)(10 * previous + i));
}

/* Rank 0 hears all others, twice, in whatever order they come. */
static void any_source(void) {
    uint8_t in[3] = {0, 0, 0}, out[3] = {0, 0, 0};
    uint64_t shape[1] = {3}, handle = 0;
    int64_t source = -1;
    carole_output *output = NULL;
    carole_tensor from = vector(in, NULL, CAROLE_UINT8, shape), to = vector(NULL, out, CAROLE_UINT8, shape);
    int i, sum = 0;

    if (size == 1) {
        EXPECT(carole_recv_any(8, &to, CAROLE_GLOBAL_SET, NULL) == CAROLE_ERROR_USAGE);
        return;
    }
    if (me != 0) {
        for (i = 0; i < 3; i++) in[i] = (uint8_t)(10 * me + i);
        OK(carole_send(0, 8, &from, CAROLE_GLOBAL_SET));
        OK(carole_send(0, 8, &from, CAROLE_GLOBAL_SET));
        return;
    }
    for (i = 1; i < size; i++) {
        OK(carole_recv_any(8, &to, CAROLE_GLOBAL_SET, i == 1 ? &source : NULL));
        EXPECT(out[0] % 10 == 0 && out[2] == out[0] + 2);
        EXPECT(i > 1 || out[0] == (uint8_t)(10 * source));
        sum += out[0];
    }
    for (i = 1; i < size; i++) {
        OK(carole_recv_any_async(8, &to, CAROLE_GLOBAL_SET, &handle));
        OK(carole_wait(handle, CAROLE_FOREVER, &output));
        EXPECT(out[0] == (uint8_t)(10 * carole_output_source(output)));
        EXPECT(carole_output_last_joined(output) == -1);
        carole_output_free(output);
        sum += out[0];
    }
    EXPECT(sum == 10 * size * (size - 1));
}

static void process_sets(void) {
    uint32_t ranks[2] = {0, 0}, set = 0, listed[8];
    uint64_t shape[1] = {1};
    size_t count = 0;
    int32_t x = me + 1;
    int removed = 0;
    carole_options o = named("in a set", CAROLE_SUM);
    carole_tensor t = vector(&x, &x, CAROLE_INT32, shape);

    if (size < 3) return;
    ranks[1] = (uint32_t)(size - 1);
    OK(carole_add_process_set(ranks, 2, &set));
    EXPECT(carole_process_set_size(set) == 2);
    OK(carole_process_set_ranks(set, listed, 8, &count));
    EXPECT(count == 2 && listed[0] == 0 && listed[1] == (uint32_t)(size - 1));
    OK(carole_process_sets(listed, 8, &count));
    EXPECT(count == 2 && listed[0] == CAROLE_GLOBAL_SET && listed[1] == set);
    o.process_set = set;
    if (me == 0 || me == size - 1) {
        EXPECT(carole_process_set_rank(set) == (me == 0 ? 0 : 1));
        OK(carole_allreduce(&t, 1, &o, NULL));
        EXPECT(x == 1 + size);
    } else {
        EXPECT(carole_process_set_rank(set) == -1);
    }
    OK(carole_remove_process_set(set, &removed));
    EXPECT(removed == 1);
    OK(carole_remove_process_set(CAROLE_GLOBAL_SET, &removed));
    EXPECT(removed == 0);
}

static void mistakes(void) {
    float x = 1;
    uint64_t shape[1] = {1}, rows[1], handle = 0;
    carole_options o = named("mistake", CAROLE_SUM);
    carole_tensor t = vector(&x, &x, CAROLE_FLOAT32, shape);
    int code;

    o.op = 99;
    EXPECT(carole_allreduce(&t, 1, &o, NULL) == CAROLE_ERROR_USAGE);
    EXPECT(strstr(carole_last_error(), "99") != NULL);
    o.op = CAROLE_SUM;
    o.struct_size = 1;
    EXPECT(carole_allreduce(&t, 1, &o, NULL) == CAROLE_ERROR_USAGE);
    o.struct_size = sizeof o;
    EXPECT(carole_allreduce_async(&t, 1, &o, NULL) == CAROLE_ERROR_USAGE);
    EXPECT(carole_submit(99, &t, 1, NULL, 0, &o, &handle) == CAROLE_ERROR_USAGE);
    EXPECT(carole_last_culprit() == -1);
    o.process_set = 12345;
    EXPECT(carole_allreduce(&t, 1, &o, NULL) == CAROLE_ERROR_USAGE);
    o.process_set = CAROLE_GLOBAL_SET;

    /* Ranks that disagree are told so, all of them, and the group goes on. */
    if (size > 1) {
        float many[64];
        memset(many, 0, sizeof many);
        rows[0] = (uint64_t)(me + 1);
        t = vector(many, many, CAROLE_FLOAT32, rows);
        o.name = "disagreement";
        EXPECT(carole_allreduce(&t, 1, &o, NULL) == CAROLE_ERROR_MISMATCH);
        EXPECT(strstr(carole_last_error(), "disagreement") != NULL);

        /* A tensor that one rank alone gets wrong. */
        t = vector(many, many, me == size - 1 ? 77u : CAROLE_FLOAT32, shape);
        o.name = "wrong type";
        code = carole_allreduce(&t, 1, &o, NULL);
        EXPECT(code == CAROLE_ERROR_MISMATCH || (me == size - 1 && code == CAROLE_ERROR_USAGE));

        /* A rank that comes late: the wait ends, the operation does not. */
        t = vector(&x, &x, CAROLE_FLOAT32, shape);
        o.name = "late";
        x = 1;
        if (me == 0) {
            OK(carole_allreduce_async(&t, 1, &o, &handle));
            EXPECT(carole_wait(handle, 20, NULL) == CAROLE_ERROR_TIMEOUT);
        }
        o.name = "now";
        OK(carole_barrier(&o));
        o.name = "late";
        if (me != 0) OK(carole_allreduce_async(&t, 1, &o, &handle));
        OK(carole_wait(handle, CAROLE_FOREVER, NULL));
        EXPECT(x == (float)size);
    }
}

static void join(void) {
    /* Rank r runs r more operations than rank 0, which has the least data. */
    int64_t x = 0, last = -1;
    uint64_t shape[1] = {1};
    char name[32];
    carole_tensor t = vector(&x, &x, CAROLE_INT64, shape);
    carole_options o = named(name, CAROLE_SUM);
    int step;

    for (step = 0; step < me; step++) {
        sprintf(name, "join.%d", step);
        x = 1;
        OK(carole_allreduce(&t, 1, &o, NULL));
        EXPECT(x == size - 1 - step);
    }
    OK(carole_join(NULL, &last));
    EXPECT(last >= 0 && last < size);
}

static void released(void) {
    static float x;
    uint64_t shape[1] = {1}, handle = 0;
    carole_tensor t = vector(&x, &x, CAROLE_FLOAT32, shape);
    carole_options o = named("released", CAROLE_SUM);
    OK(carole_allreduce_async(&t, 1, &o, &handle));
    OK(carole_release(handle));
    EXPECT(carole_wait(handle, 0, NULL) == CAROLE_ERROR_USAGE);
    OK(carole_barrier(NULL));
}

/* A new epoch of the same ranks, while nothing is wrong. */
static void reform(void) {
    int64_t before = carole_epoch();
    OK(carole_reform());
    EXPECT(carole_epoch() == before + 1);
    EXPECT(carole_rank() == me && carole_size() == size);
    allreduce();
}

static void persistent(void) {
    uint64_t shape[1] = {3}, row[1] = {1};
    float x[3] = {0}, in_place[3] = {0};
    int64_t mine = me;
    int turn, done = 0;
    carole_tensor t = vector(x, in_place, CAROLE_FLOAT32, shape), r = vector(&mine, NULL, CAROLE_INT64, row);
    carole_options o = named("planned", CAROLE_SUM);
    carole_persistent *sum = NULL, *rows = NULL;
    OK(carole_plan(CAROLE_ALLREDUCE, &t, 1, NULL, 0, &o, &sum));
    OK(carole_plan(CAROLE_ALLGATHER, &r, 1, NULL, 0, NULL, &rows));
    EXPECT(carole_persistent_data(sum, 0) == NULL && carole_persistent_bytes(sum, 0) == sizeof x);
    EXPECT(carole_persistent_bytes(rows, 0) == (uint64_t)size * sizeof mine);
    for (turn = 0; turn < 3; turn++) {
        x[0] = (float)me, x[1] = (float)turn, x[2] = 1;
        mine = me + turn;
        OK(carole_persistent_start(sum));
        EXPECT(carole_persistent_start(sum) == CAROLE_ERROR_USAGE);
        OK(carole_persistent_run(rows));
        OK(carole_persistent_poll(sum, &done));
        OK(carole_persistent_wait(sum, CAROLE_FOREVER));
        EXPECT(in_place[0] == rank_sum() && in_place[1] == turn * size && in_place[2] == size);
        EXPECT(((int64_t *)carole_persistent_data(rows, 0))[size - 1] == size - 1 + turn);
    }
    OK(carole_persistent_wait(sum, 0));
    EXPECT(carole_join(NULL, NULL) == CAROLE_ERROR_USAGE);
    EXPECT(carole_plan(99, &t, 1, NULL, 0, &o, &sum) == CAROLE_ERROR_USAGE);
    EXPECT(carole_plan(CAROLE_BARRIER, NULL, 0, NULL, 0, NULL, &rows) != CAROLE_OK);
    EXPECT(carole_persistent_start(NULL) == CAROLE_ERROR_USAGE);
    OK(carole_persistent_free(sum));
    OK(carole_persistent_free(rows));
    OK(carole_persistent_free(NULL));
}

static void shared(void) {
    enum { COUNT = 100000 };
    uint64_t shape[1] = {COUNT};
    void *memory = NULL, *other = NULL;
    float *x;
    int turn, i, wrong;
    OK(carole_allocate(COUNT * sizeof(float), &memory));
    OK(carole_allocate(0, &other));
    EXPECT(other != NULL && other != memory);
    x = (float *)memory;
    for (turn = wrong = 0; turn < 3; turn++) {
        carole_tensor t = vector(x, x, CAROLE_FLOAT32, shape);
        carole_options o = named("shared", CAROLE_SUM);
        for (i = 0; i < COUNT; i++) wrong += turn == 0 && x[i] != 0, x[i] = (float)(me + i % 100);
        OK(carole_allreduce(&t, 1, &o, NULL));
        for (i = 0; i < COUNT; i++) wrong += x[i] != rank_sum() + (float)(size * (i % 100));
    }
    EXPECT(wrong == 0);
    EXPECT(carole_allocate(1, NULL) == CAROLE_ERROR_USAGE);
    EXPECT(carole_allocate(UINT64_MAX, &memory) == CAROLE_ERROR_USAGE && memory == x);
    EXPECT(carole_deallocate(&i) == CAROLE_ERROR_USAGE);
    OK(carole_deallocate(x));
    EXPECT(carole_deallocate(x) == CAROLE_ERROR_USAGE);
    OK(carole_deallocate(other));
    OK(carole_deallocate(NULL));
}

int main(void) {
    int round;
    EXPECT(carole_abi_version() == CAROLE_ABI_VERSION);
    EXPECT(strlen(carole_version()) > 0);
    before_init();
    for (round = 0; round < 2; round++) { /* init after shutdown works */
        OK(carole_init(NULL));
        if (carole_is_initialized() != 1) return 1;
        me = (int)carole_rank();
        size = (int)carole_size();
        world();
        allreduce();
        unequal_rows();
        alltoall();
        rooted();
        persistent();
        shared();
        messages();
        any_source();
        process_sets();
        mistakes();
        released();
        join();
        reform();
        OK(carole_shutdown());
        EXPECT(carole_is_initialized() == 0);
    }
    printf("rank %d of %d: %d failures\n", me, size, failures);
    return failures == 0 ? 0 : 1;
}
