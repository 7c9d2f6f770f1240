/* Sums a vector over all ranks.
 *
 *   cc -std=c99 allreduce.c $(pkg-config --cflags --libs carole) -o allreduce
 *   carolerun -np 4 ./allreduce
 */
#include <carole.h>
#include <stdio.h>

static int check(int code, const char *what) {
    if (code != CAROLE_OK) {
        fprintf(stderr, "%s failed (code %d): %s\n", what, code, carole_last_error());
    }
    return code;
}

int main(void) {
    float values[4];
    uint64_t shape[1] = {4};
    carole_tensor tensor;
    carole_options options;
    int i;

    if (check(carole_init(NULL), "carole_init")) {
        return 1;
    }
    for (i = 0; i < 4; i++) {
        values[i] = (float)(i + 10 * carole_rank());
    }

    tensor.input = values;
    tensor.output = values; /* in place */
    tensor.dtype = CAROLE_FLOAT32;
    tensor.dimensions = 1;
    tensor.shape = shape;
    CAROLE_OPTIONS_INIT(options);
    options.name = "values";
    options.op = CAROLE_SUM;
    if (check(carole_allreduce(&tensor, 1, &options, NULL), "carole_allreduce")) {
        return 1;
    }

    printf("rank %d of %d: %g %g %g %g\n", (int)carole_rank(), (int)carole_size(), values[0], values[1],
           values[2], values[3]);
    return check(carole_shutdown(), "carole_shutdown");
}
