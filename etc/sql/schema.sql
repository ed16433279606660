-- The recipient tables of contentfilter, for MariaDB 10.3 or MySQL 5.7 and later.
--
--   mariadb contentfilter < schema.sql
--
-- address: user@domain, @domain or domain, .domain (all its subdomains), * (everyone); the most specific one decides.
-- exempt:  1 = not checked, whatever a less specific row says.
-- The other columns may be NULL: then the configuration decides. docs/tables.md describes them.
--
-- updated_at, with microseconds, and its index let the daemon detect a change with one short query.

CREATE TABLE IF NOT EXISTS clamavclients (
    address    VARCHAR(320) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL PRIMARY KEY,
    exempt     TINYINT(1) NOT NULL DEFAULT 0,
    virus      VARCHAR(330) NULL,        -- mark, remove, reject, move:ADDRESS
    updated_at TIMESTAMP(6) NOT NULL DEFAULT CURRENT_TIMESTAMP(6) ON UPDATE CURRENT_TIMESTAMP(6),
    KEY updated_at (updated_at)
) ENGINE = InnoDB;

CREATE TABLE IF NOT EXISTS spamdclients (
    address      VARCHAR(320) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL PRIMARY KEY,
    exempt       TINYINT(1) NOT NULL DEFAULT 0,
    spam         VARCHAR(330) NULL,      -- mark, remove, reject, move:ADDRESS
    score        VARCHAR(15) NULL,       -- points, or very-aggressive, aggressive, default, normal, relaxed, permissive
    reject_score DECIMAL(7,2) NULL,      -- points; 0 = never
    updated_at   TIMESTAMP(6) NOT NULL DEFAULT CURRENT_TIMESTAMP(6) ON UPDATE CURRENT_TIMESTAMP(6),
    KEY updated_at (updated_at)
) ENGINE = InnoDB;
