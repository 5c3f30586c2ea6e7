/* Servers, what is sent to each of them with every request, and who asks. */
#include "http_inner.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "url.h"

bool mls_http_is_visible(const char *text, size_t nbytes)
{
    for (size_t i = 0; i < nbytes; i++)
        if ((unsigned char)text[i] <= 0x20 || (unsigned char)text[i] >= 0x7f)
            return false;
    return true;
}

/* ---- headers ---- */

int mls_http_header_parse(const char *line, mls_http_header *out, const char **why)
{
    const char *colon = strchr(line, ':');
    *why = "a header is \"Name: value\" of printable characters";
    if (!colon || colon == line || !mls_http_is_visible(line, (size_t)(colon - line)))
        return -EINVAL;
    for (const char *c = colon + 1; *c; c++)
        if (((unsigned char)*c < 0x20 && *c != '\t') || *c == 0x7f)
            return -EINVAL;
    const size_t nname = (size_t)(colon - line);
    const char *value = colon + 1 + strspn(colon + 1, " \t");
    *why = NULL;
    *out = (mls_http_header){.line = strdup(line), .name = strndup(line, nname)};
    if (!out->line || !out->name) {
        mls_http_header_free(out);
        return -ENOMEM;
    }
    if (!*value) { /* libcurl takes "Name:" for a header to be left out, and "Name;" for one without value */
        out->line[nname] = ';';
        out->line[nname + 1] = '\0';
        value = line + strlen(line);
    }
    out->value = *value ? out->line + (value - line) : "";
    for (char *c = out->name; *c; c++)
        *c = (char)(*c >= 'A' && *c <= 'Z' ? *c + 32 : *c);
    out->sign = strncmp(out->name, "x-amz-", 6) == 0 || strcmp(out->name, "content-md5") == 0 ||
                strcmp(out->name, "content-type") == 0;
    return 0;
}

void mls_http_header_free(mls_http_header *header)
{
    free(header->line);
    free(header->name);
    *header = (mls_http_header){0};
}

/* ---- the URL ---- */

/* "http://host:port/" and the Host header of a URL whose authority ends at `rest`. */
static int split_url(mls_http_endpoint *endpoint, const char *url, const char **rest, const char **why)
{
    const bool secure = strncasecmp(url, "https://", 8) == 0;
    const char *host = url + (secure ? 8 : 7);
    *why = "a URL is http://HOST[:PORT][/PATH] or https://...";
    if (!secure && strncasecmp(url, "http://", 7) != 0)
        return -EINVAL;
    const size_t nauthority = strcspn(host, "/?#");
    *rest = host + nauthority;
    const char *path_end = *rest + strlen(*rest);
    if (memchr(host, '@', nauthority)) {
        *why = "a URL holds no user name and password: give credentials apart";
        return -EINVAL;
    }
    if (!nauthority || !mls_http_is_visible(host, nauthority) || strpbrk(*rest, "?#") ||
        !mls_http_is_visible(*rest, (size_t)(path_end - *rest)))
        return -EINVAL;
    const char *bracket = memchr(host, ']', nauthority);
    const char *after = bracket ? bracket : host;
    const char *colon = memchr(after, ':', nauthority - (size_t)(after - host));
    const char *port = colon ? colon + 1 : "";
    const size_t nport = colon ? (size_t)(*rest - port) : 0;
    if (colon == host || strspn(port, "0123456789") < nport || (colon && (!nport || nport > 5)))
        return -EINVAL;
    const char *usual = secure ? "443" : "80";
    const bool is_usual = nport == strlen(usual) && memcmp(port, usual, nport) == 0;
    const size_t nhost = is_usual ? (size_t)(colon - host) : nauthority;
    endpoint->host = strndup(host, nhost);
    endpoint->base = malloc(nhost + 16);
    if (!endpoint->host || !endpoint->base)
        return -ENOMEM;
    strcpy(endpoint->base, secure ? "https://" : "http://");
    strcat(endpoint->base, endpoint->host);
    strcat(endpoint->base, "/");
    return 0;
}

/* What decides on connection and framing, or what libcurl would send anyway: it knows how to put them together. */
static bool is_libcurls(const char *name)
{
    static const char *const names[] = {
        "accept", "connection", "content-length", "expect", "host", "te", "trailer", "transfer-encoding", "upgrade",
        "user-agent",
    };
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (strcmp(name, names[i]) == 0)
            return true;
    return false;
}

static int endpoint_fill(mls_http_endpoint *endpoint, const mls_http_endpoint_spec *spec, const char **why)
{
    const char *path;
    int error = split_url(endpoint, spec->url, &path, why);
    if (error)
        return error;
    *why = "a query is escaped text without spaces";
    if (!mls_http_is_visible(spec->query, strlen(spec->query)))
        return -EINVAL;
    *why = NULL;
    const size_t npath = strlen(path), nprefix = strlen(spec->key_prefix);
    endpoint->dialect = spec->dialect;
    endpoint->follow = spec->follow;
    endpoint->plain = true;
    endpoint->path = strdup(npath ? path : "/");
    endpoint->query = strdup(spec->query);
    endpoint->head = malloc(npath + 2 + 3 * nprefix);
    if (!endpoint->path || !endpoint->query || !endpoint->head)
        return -ENOMEM;
    strcpy(endpoint->head, path);
    if (!npath || path[npath - 1] != '/')
        strcat(endpoint->head, "/");
    const size_t at = strlen(endpoint->head);
    const size_t n = mls_url_escape(endpoint->head + at, 3 * nprefix, spec->key_prefix, nprefix, true);
    endpoint->head[at + n] = '\0';
    if (spec->nheaders > MLS_HTTP_MOST_HEADERS) {
        *why = "an endpoint takes at most 16 headers";
        return -EINVAL;
    }
    for (; endpoint->nheaders < spec->nheaders; endpoint->nheaders++) {
        error = mls_http_header_parse(spec->headers[endpoint->nheaders], &endpoint->headers[endpoint->nheaders], why);
        if (error)
            return error;
        endpoint->plain = endpoint->plain && !is_libcurls(endpoint->headers[endpoint->nheaders].name);
    }
    return 0;
}

void mls_http_endpoint_free(mls_http_endpoint *endpoint)
{
    if (!endpoint)
        return;
    for (size_t i = 0; i < endpoint->nheaders; i++)
        mls_http_header_free(&endpoint->headers[i]);
    mls_http_identity_put(endpoint->identity);
    pthread_mutex_destroy(&endpoint->lock);
    free(endpoint->base);
    free(endpoint->host);
    free(endpoint->path);
    free(endpoint->head);
    free(endpoint->query);
    free(endpoint);
}

int mls_http_endpoint_add(mls_http_engine *engine, const mls_http_endpoint_spec *spec, const char **why)
{
    const unsigned number = atomic_load(&engine->nendpoints);
    *why = NULL;
    if (number == MLS_HTTP_MOST_ENDPOINTS)
        return -ENFILE;
    mls_http_endpoint *endpoint = calloc(1, sizeof *endpoint);
    if (!endpoint)
        return -ENOMEM;
    pthread_mutex_init(&endpoint->lock, NULL);
    int error = endpoint_fill(endpoint, spec, why);
    if (error) {
        mls_http_endpoint_free(endpoint);
        return error;
    }
    engine->endpoints[number] = endpoint;
    atomic_store(&engine->nendpoints, number + 1);
    return (int)number;
}

unsigned mls_http_endpoints(mls_http_engine *engine) { return atomic_load(&engine->nendpoints); }

/* ---- who asks ---- */

mls_http_identity *mls_http_identity_get(mls_http_endpoint *endpoint)
{
    pthread_mutex_lock(&endpoint->lock);
    mls_http_identity *identity = endpoint->identity;
    if (identity)
        atomic_fetch_add(&identity->refs, 1);
    pthread_mutex_unlock(&endpoint->lock);
    return identity;
}

void mls_http_identity_put(mls_http_identity *identity)
{
    if (!identity || atomic_fetch_sub(&identity->refs, 1) != 1)
        return;
    mls_sigv4_free(identity->signer);
    if (identity->bearer) {
        explicit_bzero(identity->bearer, strlen(identity->bearer));
        free(identity->bearer);
    }
    free(identity);
}

static void replace_identity(mls_http_endpoint *endpoint, mls_http_identity *identity)
{
    pthread_mutex_lock(&endpoint->lock);
    mls_http_identity *before = endpoint->identity;
    endpoint->identity = identity;
    pthread_mutex_unlock(&endpoint->lock);
    mls_http_identity_put(before);
}

static mls_http_identity *identity_new(void)
{
    mls_http_identity *identity = calloc(1, sizeof *identity);
    if (identity)
        atomic_store(&identity->refs, 1);
    return identity;
}

int mls_http_sign(mls_http_engine *engine, unsigned endpoint, const char *access_key, const char *secret_key,
                  const char *token, const char *region, const char *service)
{
    mls_http_identity *identity = NULL;
    if (access_key[0] || secret_key[0]) {
        identity = identity_new();
        if (!identity)
            return -ENOMEM;
        identity->signer = mls_sigv4_new(access_key, secret_key, token, region, service);
        if (!identity->signer) {
            const int error = errno;
            mls_http_identity_put(identity);
            return error == EINVAL ? -EINVAL : -ENOMEM;
        }
    }
    replace_identity(engine->endpoints[endpoint], identity);
    return 0;
}

int mls_http_bearer(mls_http_engine *engine, unsigned endpoint, const char *token)
{
    mls_http_identity *identity = NULL;
    if (token[0]) {
        if (!mls_http_is_visible(token, strlen(token)))
            return -EINVAL;
        static const char name[] = "Authorization: Bearer ";
        identity = identity_new();
        if (!identity)
            return -ENOMEM;
        identity->bearer = malloc(sizeof name + strlen(token));
        if (!identity->bearer) {
            mls_http_identity_put(identity);
            return -ENOMEM;
        }
        strcpy(identity->bearer, name);
        strcat(identity->bearer, token);
    }
    replace_identity(engine->endpoints[endpoint], identity);
    return 0;
}
