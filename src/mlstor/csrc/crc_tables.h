/* Tables shared by the CRC code: built once, on first use. Private to digest.c and crc_combine.c. */
#ifndef MLS_CRC_TABLES_H
#define MLS_CRC_TABLES_H

#include <stdint.h>

/* Generator polynomials, reflected: bit 31 is x^0, bit 0 is x^31; x^32 is implied. */
#define MLS_POLY_CRC32 0xedb88320u
#define MLS_POLY_CRC32C 0x82f63b78u

/* crc times x^(8 * nbytes), modulo poly, which must be one of the two above. */
uint32_t mls_crc_times_bytes(uint32_t poly, uint32_t crc, uint64_t nbytes);

#endif
