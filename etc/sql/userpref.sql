-- SpamAssassin's user preferences, and who may read them. Run as root in the database of your choice (etc/spamassassin/sql.cf
-- names spamassassin), after grants.sql, with a password of your own.
--
--   mariadb spamassassin < userpref.sql
--
-- username: user@domain, lower-case; @domain for its other mailboxes; @GLOBAL for everybody.
-- preference, value: as in user_prefs, e.g. required_score 4.0, whitelist_from *@example.org, report_safe 0.

CREATE TABLE IF NOT EXISTS userpref (
    prefid     INT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY,
    username   VARCHAR(320) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
    preference VARCHAR(64) NOT NULL,
    value      VARCHAR(255) NOT NULL,
    KEY username (username)
) ENGINE = InnoDB;

CREATE USER IF NOT EXISTS 'spamd'@'localhost' IDENTIFIED BY 'change me';
GRANT SELECT ON userpref TO 'spamd'@'localhost';

-- contentfilter reads only who has preferences.
GRANT SELECT (username) ON userpref TO 'contentfilter'@'localhost';
