-- Who may do what in the MariaDB of compose.yaml. The image has made both users and gives the first one everything in
-- the database; the filter needs to read two tables, as in etc/sql/grants.sql.

REVOKE ALL PRIVILEGES ON contentfilter.* FROM 'contentfilter'@'%';
GRANT SELECT ON clamavclients TO 'contentfilter'@'%';
GRANT SELECT ON spamdclients TO 'contentfilter'@'%';
ALTER USER 'contentfilter'@'%' WITH MAX_USER_CONNECTIONS 4;

-- Rows are changed by `docker compose exec --user mysql mariadb mariadb contentfilter`, without a password.
GRANT SELECT, INSERT, UPDATE, DELETE ON contentfilter.* TO 'mysql'@'localhost';
