// SPDX-License-Identifier: Apache-2.0

package shop

import "time"

// OrderRequest is the body of POST /order.
type OrderRequest struct {
	// Token is chosen by the client, unguessable and used once.
	Token string `json:"token"`
}

// OrderAnswer is what POST /order answers with when the order is committed in
// PostgreSQL and counted in Redis.
type OrderAnswer struct {
	// Seq is the order's number in PostgreSQL's sequence.
	Seq   int64  `json:"seq"`
	Token string `json:"token"`
	// Count is what Redis's INCR returned.
	Count int64 `json:"count"`
}

// Order is one row of PostgreSQL's table, one line of GET /tokens.
type Order struct {
	Seq   int64  `json:"seq"`
	Token string `json:"token"`
}

// State is what GET /state answers. Asked with ?quiesce=1 the shop first lets
// running orders end and holds new ones back, so that both counts belong to
// one instant and InFlight is 0.
type State struct {
	// BootID is random for each start of the process.
	BootID   string `json:"boot_id"`
	UptimeMS int64  `json:"uptime_ms"`

	PGCount    int64 `json:"pg_count"`
	RedisCount int64 `json:"redis_count"`
	// MaxSeq is the highest sequence number in the table, 0 when it is empty.
	MaxSeq int64 `json:"max_seq"`
	// InFlight is an upper bound of the orders that were under way at any
	// time while the two counts were being read.
	InFlight int64 `json:"in_flight"`

	// PoolErrors counts every error on a member-to-member connection, and
	// every statement or command that failed, since the pools were filled.
	PoolErrors int64  `json:"pool_errors"`
	LastError  string `json:"last_error,omitempty"`
	// Reconnects counts connections dialed after the pools were filled.
	Reconnects int64 `json:"reconnects"`

	// Conns is the application's view of its connections.
	Conns Conns `json:"conns"`
	// Server is the servers' view of the same connections.
	Server Conns `json:"server"`
}

// Conns names connections by what their server calls them, in rising order.
type Conns struct {
	// PG holds backend process ids.
	PG []int64 `json:"pg"`
	// Redis is the number of connections, RedisIDs are their client ids.
	Redis    int     `json:"redis"`
	RedisIDs []int64 `json:"redis_ids"`
}

// Ack is an order that the load client was given an answer for.
type Ack struct {
	OrderAnswer
	Worker int
	// Sent is when the request was about to be written, Acked when its answer
	// had been read; both by the load client's clock.
	Sent, Acked time.Time
}

// Attempt is an order that the client never got an answer for: it may have
// happened or not.
type Attempt struct {
	Token  string
	Worker int
	Sent   time.Time
	// Err is why there was no answer.
	Err string
}
