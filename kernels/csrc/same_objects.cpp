// Whether dictionaries and lists of Python's still hold the same objects: a model has thousands, looked at in each step.
// Called with the interpreter's lock held. The functions are of Python's stable interface, so its headers are not needed.
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
}
