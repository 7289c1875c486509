/* Owns writing one step's tokens to their clients in one call: from the frame's arrays to the sockets, without Python.
 *
 * A stream is here while its tokens are text and nothing else, its client keeps up, and nobody else writes to its connection
 * (gateway/core/flights.py decides that). What cannot be done here is handed back by its index in the frame, untouched. Called
 * on the gateway's loop only; holds no lock and no Python object.
 */
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

enum { CHUNK = 0, TEXT_FRAME = 1 }; /* how an event is framed: a chunk of HTTP/1.1, a WebSocket's text message */
enum { MOST = 16384, LEAST_TABLE = 64, NOT_HERE = 0xFFFF, LONGEST = 4096 };

/* ------------------------------------------------------------ texts of tokens, as they stand in JSON */

typedef struct {
    uint32_t start;
    uint16_t size; /* NOT_HERE: no whole characters, or too long */
} Place;

typedef struct {
    int32_t count;
    Place *places;
    char *texts;
} Texts;

static int whole_characters(const unsigned char *s, uint32_t n) {
    for (uint32_t i = 0; i < n;) {
        unsigned char c = s[i];
        uint32_t more = c < 0x80 ? 0 : c >= 0xC2 && c <= 0xDF ? 1 : (c & 0xF0) == 0xE0 ? 2 : c >= 0xF0 && c <= 0xF4 ? 3 : 9;
        if (more > 3 || i + more >= n) return 0;
        for (uint32_t j = 1; j <= more; j++)
            if ((s[i + j] & 0xC0) != 0x80) return 0;
        if ((c == 0xE0 && s[i + 1] < 0xA0) || (c == 0xED && s[i + 1] > 0x9F) || (c == 0xF0 && s[i + 1] < 0x90) ||
            (c == 0xF4 && s[i + 1] > 0x8F))
            return 0;
        i += more + 1;
    }
    return 1;
}

static uint32_t escape(const unsigned char *s, uint32_t n, char *out) {
    static const char hex[] = "0123456789abcdef";
    char *to = out;
    *to++ = '"';
    for (uint32_t i = 0; i < n; i++) {
        unsigned char c = s[i];
        const char *short_form = c == '\n' ? "\\n" : c == '\r' ? "\\r" : c == '\t' ? "\\t" : c == '\b' ? "\\b"
                                 : c == '\f' ? "\\f" : c == '"' ? "\\\"" : c == '\\' ? "\\\\" : NULL;
        if (short_form) {
            *to++ = short_form[0];
            *to++ = short_form[1];
        } else if (c < 0x20) {
            memcpy(to, "\\u00", 4);
            to[4] = hex[c >> 4];
            to[5] = hex[c & 15];
            to += 6;
        } else
            *to++ = (char)c;
    }
    *to++ = '"';
    return (uint32_t)(to - out);
}

void texts_free(Texts *t) {
    if (!t) return;
    free(t->places);
    free(t->texts);
    free(t);
}

/* `bytes` are all tokens' bytes one behind the other; `ends` where each ends; of `silent` ones no text is shown. */
Texts *texts_new(const unsigned char *bytes, const uint32_t *ends, const uint8_t *silent, int32_t count) {
    Texts *t = calloc(1, sizeof *t);
    uint32_t total = count ? ends[count - 1] : 0;
    if (!t) return NULL;
    t->count = count;
    t->places = malloc(sizeof(Place) * (size_t)(count + 1));
    t->texts = malloc(6 * (size_t)total + 2 * (size_t)count + 1);
    if (!t->places || !t->texts) {
        texts_free(t);
        return NULL;
    }
    uint32_t at = 0, start = 0;
    for (int32_t i = 0; i < count; start = ends[i], i++) {
        uint32_t size = ends[i] - start;
        Place *place = &t->places[i];
        place->start = at;
        if (silent[i] || size == 0)
            place->size = 0;
        else if (size > LONGEST / 6 || !whole_characters(bytes + start, size))
            place->size = NOT_HERE;
        else {
            place->size = (uint16_t)escape(bytes + start, size, t->texts + at);
            at += place->size;
        }
    }
    char *fitted = realloc(t->texts, at + 1);
    if (fitted) t->texts = fitted;
    return t;
}

/* A token's text in JSON, for tests; -1 where it is not here. */
int32_t texts_get(const Texts *t, int32_t id, char *out) {
    if (id < 0 || id >= t->count || t->places[id].size == NOT_HERE) return -1;
    memcpy(out, t->texts + t->places[id].start, t->places[id].size);
    return t->places[id].size;
}

/* ------------------------------------------------------------ streams by sequence id, in a table of linear probing */

typedef struct {
    int64_t id;
    char *parts; /* NULL: a free place. What stands before the number or text, between them, and behind the text */
    const Texts *texts;
    double last_s;
    int64_t number; /* of the last event */
    int64_t written;
    int32_t *said; /* ids of the tokens whose texts were written, where the listener wants them back */
    int32_t next_index, descriptor, num_said, room;
    uint16_t before, middle, after;
    uint8_t framing, is_numbered, keeps;
} Stream;

typedef struct {
    Stream *streams;
    uint32_t mask, count;
    uint32_t rest_size;
    char frame[MOST];
} Burst;

static uint32_t home(const Burst *b, int64_t id) {
    return (uint32_t)(((uint64_t)id * 0x9E3779B97F4A7C15u) >> 32) & b->mask;
}

static Stream *find(const Burst *b, int64_t id) {
    for (uint32_t i = home(b, id);; i = (i + 1) & b->mask) {
        Stream *s = &b->streams[i];
        if (!s->parts) return NULL;
        if (s->id == id) return s;
    }
}

static Stream *place_for(Burst *b, int64_t id) {
    uint32_t i = home(b, id);
    while (b->streams[i].parts) i = (i + 1) & b->mask;
    return &b->streams[i];
}

static int grow(Burst *b) {
    Stream *old = b->streams;
    uint32_t size = b->mask + 1;
    Stream *bigger = calloc((size_t)size * 2, sizeof *bigger);
    if (!bigger) return 0;
    b->streams = bigger;
    b->mask = size * 2 - 1;
    for (uint32_t i = 0; i < size; i++)
        if (old[i].parts) *place_for(b, old[i].id) = old[i];
    free(old);
    return 1;
}

Burst *burst_new(void) {
    Burst *b = calloc(1, sizeof *b);
    if (!b) return NULL;
    b->streams = calloc(LEAST_TABLE, sizeof *b->streams);
    b->mask = LEAST_TABLE - 1;
    if (!b->streams) {
        free(b);
        return NULL;
    }
    return b;
}

void burst_free(Burst *b) {
    if (!b) return;
    for (uint32_t i = 0; i <= b->mask; i++)
        if (b->streams[i].parts) {
            free(b->streams[i].parts);
            free(b->streams[i].said);
        }
    free(b->streams);
    free(b);
}

/* 1 when the stream is here now, 0 when it cannot be. */
int32_t burst_add(Burst *b, const Texts *texts, int64_t id, int32_t next_index, double last_s, int32_t descriptor,
                  int32_t framing, const char *parts, int32_t before, int32_t middle, int32_t after, int32_t is_numbered,
                  int64_t number, int32_t keeps) {
    int32_t size = before + middle + after;
    if (size < 1 || size > MOST - LONGEST - 64 || find(b, id)) return 0;
    if ((b->count + 1) * 2 > b->mask && !grow(b)) return 0;
    char *own = malloc((size_t)size);
    if (!own) return 0;
    memcpy(own, parts, (size_t)size);
    Stream *s = place_for(b, id);
    *s = (Stream){.id = id, .parts = own, .texts = texts, .last_s = last_s, .number = number, .next_index = next_index,
                  .descriptor = descriptor, .before = (uint16_t)before, .middle = (uint16_t)middle, .after = (uint16_t)after,
                  .framing = (uint8_t)framing, .is_numbered = is_numbered != 0, .keeps = keeps != 0};
    b->count++;
    return 1;
}

typedef struct {
    double last_s;
    int64_t number, written;
    int32_t next_index, num_said;
} Left;

/* How a stream stands; -1 where it is not here. */
int32_t burst_look(const Burst *b, int64_t id, Left *out) {
    const Stream *s = find(b, id);
    if (!s) return -1;
    *out = (Left){s->last_s, s->number, s->written, s->next_index, s->num_said};
    return 0;
}

/* Takes a stream off; `said` has room for as many ids as `burst_look` told of. */
void burst_remove(Burst *b, int64_t id, int32_t *said) {
    Stream *s = find(b, id);
    if (!s) return;
    if (said && s->num_said) memcpy(said, s->said, sizeof *said * (size_t)s->num_said);
    free(s->parts);
    free(s->said);
    s->parts = NULL;
    b->count--;
    /* Those behind it that would no longer be found move up. */
    uint32_t hole = (uint32_t)(s - b->streams);
    for (uint32_t i = (hole + 1) & b->mask; b->streams[i].parts; i = (i + 1) & b->mask) {
        uint32_t wants = home(b, b->streams[i].id);
        if (((i - wants) & b->mask) >= ((i - hole) & b->mask)) {
            b->streams[hole] = b->streams[i];
            b->streams[i].parts = NULL;
            hole = i;
        }
    }
}

/* ------------------------------------------------------------ one step */

static char *decimal(int64_t value, char *to) {
    char digits[24];
    int n = 0;
    do digits[n++] = (char)('0' + value % 10);
    while (value /= 10);
    while (n) *to++ = digits[--n];
    return to;
}

/* An event in its frame; room is left in front for the frame's head. Returns where it begins. */
static char *compose(char *frame, const Stream *s, const char *text, uint32_t size, uint32_t *all) {
    static const char hex[] = "0123456789abcdef";
    char *body = frame + 32, *to = body;
    memcpy(to, s->parts, s->before);
    to += s->before;
    if (s->is_numbered) to = decimal(s->number + 1, to);
    memcpy(to, s->parts + s->before, s->middle);
    to += s->middle;
    memcpy(to, text, size);
    to += size;
    memcpy(to, s->parts + s->before + s->middle, s->after);
    to += s->after;
    uint32_t length = (uint32_t)(to - body);
    char *head = body;
    if (s->framing == CHUNK) {
        *--head = '\n';
        *--head = '\r';
        for (uint32_t left = length;; left >>= 4) {
            *--head = hex[left & 15];
            if (left < 16) break;
        }
        *to++ = '\r';
        *to++ = '\n';
    } else if (length < 126) {
        *--head = (char)length;
        *--head = (char)0x81;
    } else {
        *--head = (char)(length & 0xFF);
        *--head = (char)(length >> 8);
        *--head = 126;
        *--head = (char)0x81;
    }
    *all = (uint32_t)(to - head);
    return head;
}

static int remember(Stream *s, int32_t token) {
    if (s->num_said == s->room) {
        int32_t room = s->room ? s->room * 2 : 64;
        int32_t *bigger = realloc(s->said, sizeof *bigger * (size_t)room);
        if (!bigger) return 0;
        s->said = bigger;
        s->room = room;
    }
    s->said[s->num_said++] = token;
    return 1;
}

/* Writes what it can of `count` rows. `left` gets the indexes of the others; the row that ended the call, if its client took
 * only a part, has its event's rest in `rest` (`burst_rest`). `gaps` and `times`: equal times since the tokens before, and how
 * many had them; `nums`: how many rows are left, how many gaps there are, and the size of the rest. Returns the index of the row that is to be gone on with. */
int32_t burst_step(Burst *b, const int64_t *ids, const int32_t *first, const int32_t *tokens, int32_t from, int32_t count,
                   double now_s, int32_t *left, double *gaps, int32_t *times, int32_t *nums) {
    int32_t num_left = 0, num_gaps = 0, i = from;
    b->rest_size = 0;
    for (; i < count && !b->rest_size; i++) {
        Stream *s = find(b, ids[i]);
        int32_t token = tokens[i];
        const Place *place = s && token >= 0 && token < s->texts->count ? &s->texts->places[token] : NULL;
        if (!place || place->size == NOT_HERE || first[i] != s->next_index || (s->keeps && place->size && !remember(s, token))) {
            left[num_left++] = i;
            continue;
        }
        double gap = now_s - s->last_s;
        if (num_gaps && gaps[num_gaps - 1] == gap)
            times[num_gaps - 1]++;
        else {
            gaps[num_gaps] = gap;
            times[num_gaps++] = 1;
        }
        s->next_index++;
        s->last_s = now_s;
        if (!place->size) continue;
        uint32_t size;
        char *event = compose(b->frame, s, s->texts->texts + place->start, place->size, &size);
        s->number++;
        ssize_t sent = send(s->descriptor, event, size, MSG_DONTWAIT | MSG_NOSIGNAL);
        s->written += sent > 0 ? sent : 0;
        if (sent != (ssize_t)size) { /* its buffer is full, or the client is gone: the transport finds out which */
            uint32_t done = sent > 0 ? (uint32_t)sent : 0;
            b->rest_size = size - done;
            memmove(b->frame, event + done, b->rest_size);
        }
    }
    nums[0] = num_left;
    nums[1] = num_gaps;
    nums[2] = (int32_t)b->rest_size;
    return i;
}

/* What the last row's client did not take. */
void burst_rest(const Burst *b, char *out) { memcpy(out, b->frame, b->rest_size); }
