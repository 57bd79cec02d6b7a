// Whether a model is what it was: its dictionaries and lists hold the same objects, and its tensors lie where they lay. A model
// has thousands, looked at in each step. Called with the interpreter's lock held. The functions are of the stable interfaces
// of Python and PyTorch, so no headers of theirs are needed.
#include <cstdint>

struct Object;
extern "C" {
int PyDict_Next(Object*, intptr_t*, Object**, Object**);
intptr_t PyList_Size(Object*);
Object* PyList_GetItem(Object*, intptr_t);

// then: for each dictionary, then for each list, what it held: how many objects, and where each lay. The caller keeps these
// alive, or another could have come to lie there.
int same_objects(Object* const* dictionaries, int64_t many, Object* const* lists, int64_t more, const uint64_t* then) {
    for (int64_t i = 0; i < many; ++i) {
        const uint64_t count = *then++;
        uint64_t seen = 0;
        intptr_t at = 0;
        Object *key, *held;
        for (; PyDict_Next(dictionaries[i], &at, &key, &held); ++seen)
            if (seen >= count || reinterpret_cast<uint64_t>(held) != then[seen]) return 0;
        if (seen != count) return 0;
        then += count;
    }
    for (int64_t i = 0; i < more; ++i) {
        const intptr_t count = static_cast<intptr_t>(*then++);
        if (PyList_Size(lists[i]) != count) return 0;
        for (intptr_t j = 0; j < count; ++j)
            if (reinterpret_cast<uint64_t>(PyList_GetItem(lists[i], j)) != then[j]) return 0;
        then += count;
    }
    return 1;
}

// PyTorch's, for a tensor: its memory, number of dimensions, sizes and strides. Each returns 0 where it went well.
struct Looks {
    int32_t (*place)(void*, void**);
    int32_t (*dims)(void*, int64_t*);
    int32_t (*sizes)(void*, int64_t**);
    int32_t (*strides)(void*, int64_t**);
};

// then: for each tensor where it lay, its number of dimensions, its sizes and its strides.
int same_tensors(void* const* tensors, int64_t many, const Looks* look, const int64_t* then) {
    for (int64_t i = 0; i < many; ++i) {
        void* place;
        int64_t dims, *sizes, *strides;
        if (look->place(tensors[i], &place) || look->dims(tensors[i], &dims) || look->sizes(tensors[i], &sizes) ||
            look->strides(tensors[i], &strides))
            return 0;
        if (reinterpret_cast<int64_t>(place) != then[0] || dims != then[1]) return 0;
        then += 2;
        for (int64_t d = 0; d < dims; ++d)
            if (sizes[d] != then[d] || strides[d] != then[dims + d]) return 0;
        then += 2 * dims;
    }
    return 1;
}
}
