#include "url.h"

static inline bool stays(unsigned char c, bool keep_slash)
{
    const unsigned char lower = c | 0x20;
    return (lower >= 'a' && lower <= 'z') || (c >= '0' && c <= '9') || c == '-' || c == '.' || c == '_' || c == '~' ||
           (keep_slash && c == '/');
}

size_t mls_url_escape(char *dst, size_t room, const char *src, size_t n, bool keep_slash)
{
    static const char digits[16] = "0123456789ABCDEF";
    size_t at = 0;

    for (size_t i = 0; i < n; i++) {
        const unsigned char c = (unsigned char)src[i];
        const size_t width = stays(c, keep_slash) ? 1 : 3;
        if (at + width <= room) {
            if (width == 1) {
                dst[at] = (char)c;
            } else {
                dst[at] = '%';
                dst[at + 1] = digits[c >> 4];
                dst[at + 2] = digits[c & 15];
            }
        }
        at += width;
    }
    return at;
}
