/* Leadline's C interface: export one function for each op and direction that you have, and run `leadline verify ctypes:LIB.so`.
 *
 *     int leadline_rmsnorm(const leadline_array *inputs, int n_inputs, leadline_array *outputs, int n_outputs, const char *attrs_json);
 *     int leadline_rmsnorm_bwd(...);             the backward; in a name, "." is "_": router.noaux_tc is leadline_router_noaux_tc
 *     const char *leadline_describe(void);       optional: what `exec:` programs answer to "describe", as JSON
 *
 * `leadline ops show rmsnorm` lists an op's inputs, outputs and attributes. Arrays are dense, in C order, aligned to 64 bytes. Inputs must
 * not be changed. Outputs are allocated, filled with 0xFF, and have the shape and dtype that are due: real numbers as the precision says
 * (BF16 at bf16), exact ones F32, indices I64. Nothing may be written beyond them, nor kept after the return. A function returns
 * LEADLINE_OK; LEADLINE_REFUSED if it does not do this (the case is SKIPPED); anything else is an ERROR. Without leadline_describe it is
 * given every attribute and must refuse the values that it does not have. */
#ifndef LEADLINE_H
#define LEADLINE_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

enum leadline_dtype {
    LEADLINE_F64 = 1, LEADLINE_F32, LEADLINE_BF16, LEADLINE_F16,
    LEADLINE_U8, LEADLINE_U16, LEADLINE_U32, LEADLINE_U64,
    LEADLINE_I8, LEADLINE_I16, LEADLINE_I32, LEADLINE_I64, LEADLINE_BOOL
};

enum leadline_status { LEADLINE_OK = 0, LEADLINE_REFUSED = 1, LEADLINE_FAILED = 2 };

typedef struct {
    void *data;
    int32_t dtype; /* a leadline_dtype */
    int32_t ndim;
    const int64_t *shape;
    const char *name; /* as in the op's signature */
} leadline_array;

/* The array of a name, or NULL: optional inputs may be missing. */
static inline const leadline_array *leadline_find(const leadline_array *arrays, int count, const char *name) {
    for (int i = 0; i < count; i++)
        if (strcmp(arrays[i].name, name) == 0) return &arrays[i];
    return NULL;
}

/* What follows "name": in the attributes, or NULL: a number, true, false, null, or a string with its quotes. */
static inline const char *leadline_attr(const char *attrs_json, const char *name) {
    size_t length = strlen(name);
    for (const char *at = strchr(attrs_json, '"'); at; at = strchr(at + 1, '"'))
        if (strncmp(at + 1, name, length) == 0 && strncmp(at + 1 + length, "\": ", 3) == 0) return at + length + 4;
    return NULL;
}

static inline double leadline_number(const char *attrs_json, const char *name, double otherwise) {
    const char *value = leadline_attr(attrs_json, name);
    return value ? strtod(value, NULL) : otherwise;
}

static inline float leadline_from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* The nearest bfloat16, ties to even. */
static inline uint16_t leadline_to_bf16(float value) {
    uint32_t wide;
    memcpy(&wide, &value, sizeof wide);
    if ((wide & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0; /* NaN */
    return (uint16_t)((wide + 0x7FFFu + ((wide >> 16) & 1u)) >> 16);
}

#ifdef __cplusplus
}
#endif

#endif
