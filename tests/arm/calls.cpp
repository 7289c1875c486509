// Owns a program that makes recorded calls of the compiled operations (worker/native) on another machine: for a processor that the
// tests' own machine only emulates, without Python. tests/arm/tape.py writes what it reads, and says how.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

extern "C" {
int vector_lanes();
const char* instruction_set();
#define FOR_EACH(DO)                                                                                                       \
    DO(use_threads) DO(pack_float32) DO(pack_bfloat16_for_float32) DO(pack_blocks) DO(multiply_float32)                    \
    DO(multiply_bfloat16) DO(quantise_rows_float32) DO(quantise_rows_bfloat16) DO(rms_norm_float32) DO(rms_norm_bfloat16)  \
    DO(layer_norm_float32) DO(layer_norm_bfloat16) DO(silu_gate_float32) DO(silu_gate_bfloat16) DO(largest_float32)        \
    DO(attend_float32_float32) DO(attend_float32_bfloat16) DO(attend_bfloat16_float32) DO(attend_bfloat16_bfloat16)        \
    DO(gated_layers_float32) DO(gated_layers_bfloat16) DO(parallel_layers_float32) DO(parallel_layers_bfloat16)
#define DECLARE(NAME) void NAME();
FOR_EACH(DECLARE)
}

namespace {

struct Function {
    const char* name;
    void (*address)();
};
#define ROW(NAME) {#NAME, NAME},
const Function FUNCTIONS[] = {FOR_EACH(ROW)};

[[noreturn]] void fail(const char* what, const std::string& which) {
    std::fprintf(stderr, "%s %s\n", what, which.c_str());
    std::exit(1);
}

struct File {
    std::FILE* file;
    void read(void* to, size_t bytes) {
        if (std::fread(to, 1, bytes, file) != bytes) fail("cannot read", "the calls");
    }
    int64_t number() {
        int64_t x;
        read(&x, sizeof x);
        return x;
    }
};

void (*find(const std::string& name))() {
    for (const Function& one : FUNCTIONS)
        if (name == one.name) return one.address;
    fail("no such function:", name);
}

constexpr int MOST_NUMBERS = 20, MOST_REALS = 2;

// On 64-bit Arm numbers, pointers and floats take their places apart from each other, and each number a place of eight bytes: so all
// functions take what one with enough of both is given.
void call(void (*address)(), const int64_t* n, const float* r) {
    typedef void (*Any)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                        int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float, float);
    ((Any)address)(n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], n[12], n[13], n[14], n[15], n[16], n[17],
                   n[18], n[19], r[0], r[1]);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 3) {
        std::printf("%d %s\n", vector_lanes(), instruction_set());
        return 0;
    }
    File in{std::fopen(argv[1], "rb")};
    if (!in.file) fail("cannot open", argv[1]);
    std::vector<uint8_t*> buffers(in.number());
    std::vector<int64_t> sizes;
    for (uint8_t*& buffer : buffers) {
        sizes.push_back(in.number());
        buffer = (uint8_t*)std::aligned_alloc(64, (sizes.back() + 127) / 64 * 64);
        in.read(buffer, sizes.back());
    }
    for (int64_t left = in.number(); left > 0; left--) {  // addresses that structures hold
        const int64_t buffer = in.number(), offset = in.number(), target = in.number();
        uint8_t* const address = buffers[target] + in.number();
        std::memcpy(buffers[buffer] + offset, &address, sizeof address);
    }
    for (int64_t left = in.number(); left > 0; left--) {
        char name[64];
        in.read(name, sizeof name);
        int64_t numbers[MOST_NUMBERS] = {}, num_numbers = 0, num_reals = 0;
        float reals[MOST_REALS] = {};
        for (int64_t args = in.number(); args > 0; args--) {
            const int64_t kind = in.number(), first = in.number(), second = in.number();
            if (kind == 1 ? num_reals == MOST_REALS : num_numbers == MOST_NUMBERS) fail("too many arguments:", name);
            if (kind == 1)
                std::memcpy(&reals[num_reals++], &first, sizeof(float));
            else
                numbers[num_numbers++] = kind == 2 ? (int64_t)(buffers[first] + second) : first;
        }
        call(find(name), numbers, reals);
    }
    std::FILE* out = std::fopen(argv[2], "wb");
    if (!out) fail("cannot open", argv[2]);
    for (size_t i = 0; i < buffers.size(); i++)
        if (std::fwrite(buffers[i], 1, sizes[i], out) != (size_t)sizes[i]) fail("cannot write", argv[2]);
    return std::fclose(out);
}
