// out[i] = NF4[code i] * scale of its block, 16 numbers a thread.
//@include weights
//@header
//@body
const size_t first = size_t(thread_position_in_grid.x) * 16;
if (first >= size_t(w_shape[0]) * 4) return;
float code[16];
read_codes<MODE, 4>(w + first / 4, code);
const float s = SCALE(first / GROUP);
for (int i = 0; i < 16; i++) out[first + i] = T(code[i] * s);
