/* The window is doubled on trial where transfers take long, and stays so only where that gave more bytes per second: on
 * distant storage it does, on storage that is at its limit it would only push the staging memory out of the caches.
 */
#include "window.h"

#include <string.h>

/* Two transfers of 1 MiB in flight that take 1 ms each are 2 GB/s per worker: faster ones need no more. */
#define SLOW_TRANSFER_NS 1000000u
#define MEASURED_WINDOWS 4u
#define MEASURED_TRANSFERS 8u
/* A gain as of latency that was hidden is believed at once, a smaller one after three pairs of rates that agree. */
#define PLAIN_GAIN 1.5
#define GAIN_OF_ONE 1.05
#define GAIN_OF_ALL 1.1
#define PAIRS 3u
#define FIRST_PATIENCE 16u
#define MOST_PATIENCE 1024u

static void set(mls_window *window, uint64_t bytes)
{
    window->unsettled_bytes = window->bytes > bytes ? window->bytes : bytes;
    window->bytes = bytes;
}

void mls_window_init(mls_window *window, uint64_t begin_bytes, uint64_t most_bytes)
{
    memset(window, 0, sizeof *window);
    window->narrow_bytes = begin_bytes;
    window->most_bytes = most_bytes;
    window->patience = FIRST_PATIENCE;
    set(window, begin_bytes);
}

void mls_window_rest(mls_window *window)
{
    window->unsettled_bytes = window->bytes;
    window->took_bytes = window->took_count = window->took_ns = 0;
}

static void begin_trial(mls_window *window, double rate)
{
    window->trying = true;
    window->pairs = 0;
    window->narrow_rate = rate;
    window->narrow_sum = window->wide_sum = 0;
    set(window, 2 * window->narrow_bytes);
}

static void end_trial(mls_window *window, bool wider)
{
    window->trying = false;
    if (wider) {
        window->narrow_bytes = window->bytes;
        window->patience = FIRST_PATIENCE;
        return;
    }
    window->pause = window->patience;
    if (window->patience < MOST_PATIENCE)
        window->patience *= 2;
    set(window, window->narrow_bytes);
}

static void judge_wide(mls_window *window, double rate)
{
    window->pairs++;
    window->narrow_sum += window->narrow_rate;
    window->wide_sum += rate;
    if (rate > PLAIN_GAIN * window->narrow_rate)
        end_trial(window, true);
    else if (rate < GAIN_OF_ONE * window->narrow_rate)
        end_trial(window, false);
    else if (window->pairs == PAIRS)
        end_trial(window, window->wide_sum > GAIN_OF_ALL * window->narrow_sum);
    else
        set(window, window->narrow_bytes);
}

void mls_window_note(mls_window *window, uint64_t nbytes, uint64_t took_ns, uint64_t now_ns)
{
    if (!window->bytes)
        return;
    if (window->unsettled_bytes) {
        window->unsettled_bytes -= nbytes < window->unsettled_bytes ? nbytes : window->unsettled_bytes;
        window->begin_ns = now_ns;
        return;
    }
    window->took_bytes += nbytes;
    window->took_ns += took_ns;
    window->took_count++;
    if (window->took_bytes < MEASURED_WINDOWS * window->bytes || window->took_count < MEASURED_TRANSFERS ||
        now_ns <= window->begin_ns)
        return;
    double rate = (double)window->took_bytes / (double)(now_ns - window->begin_ns);
    bool slow = window->took_ns / window->took_count > SLOW_TRANSFER_NS;
    window->took_bytes = window->took_count = window->took_ns = 0;
    window->begin_ns = now_ns;
    if (!window->trying) {
        if (window->pause)
            window->pause--;
        else if (slow && 2 * window->narrow_bytes <= window->most_bytes)
            begin_trial(window, rate);
    } else if (window->bytes == window->narrow_bytes) {
        window->narrow_rate = rate;
        set(window, 2 * window->narrow_bytes);
    } else {
        judge_wide(window, rate);
    }
}
