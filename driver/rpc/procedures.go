package rpc

// The procedures of ProgramRemote that the driver knows.
const (
	ProcConnectOpen                 Procedure = 1
	ProcConnectClose                Procedure = 2
	ProcDomainAttachDevice          Procedure = 8
	ProcDomainDetachDevice          Procedure = 13
	ProcDomainSetMaxMemory          Procedure = 30
	ProcDomainSetMemory             Procedure = 31
	ProcDomainSetVcpus              Procedure = 32
	ProcDomainCoreDump              Procedure = 53
	ProcDomainSave                  Procedure = 55
	ProcConnectSupportsFeature      Procedure = 60
	ProcDomainMigratePerform        Procedure = 62
	ProcAuthList                    Procedure = 66
	ProcConnectGetURI               Procedure = 110
	ProcDomainAttachDeviceFlags     Procedure = 160
	ProcDomainDetachDeviceFlags     Procedure = 161
	ProcDomainAbortJob              Procedure = 164
	ProcDomainUpdateDeviceFlags     Procedure = 174
	ProcDomainManagedSave           Procedure = 182
	ProcDomainSnapshotCreateXML     Procedure = 185
	ProcDomainRevertToSnapshot      Procedure = 192
	ProcDomainSetVcpusFlags         Procedure = 199
	ProcDomainSetMemoryFlags        Procedure = 204
	ProcDomainMigrateBegin3         Procedure = 213
	ProcDomainMigratePerform3       Procedure = 216
	ProcDomainSaveFlags             Procedure = 232
	ProcDomainMigrateBegin3Params   Procedure = 302
	ProcDomainMigratePerform3Params Procedure = 305
	ProcDomainCoreDumpWithFormat    Procedure = 334
	ProcDomainOpenGraphicsFD        Procedure = 343
	ProcDomainSetGuestVcpus         Procedure = 372
	ProcDomainSetVcpu               Procedure = 384
	ProcDomainDetachDeviceAlias     Procedure = 392
	ProcDomainCheckpointCreateXML   Procedure = 411
	ProcDomainBackupBegin           Procedure = 421
	ProcDomainStartDirtyRateCalc    Procedure = 427
	ProcDomainSaveParams            Procedure = 440
	ProcDomainAbortJobFlags         Procedure = 442
)

// The features of ProcConnectSupportsFeature that the driver answers itself.
const (
	FeatureFDPassing        = 8
	FeatureProgramKeepalive = 10
)

// ConnectRO is the flag of ProcConnectOpen for a read-only connection.
const ConnectRO = 1 << 0

// Flags of a migration.
const (
	MigrateLive             = 1 << 0
	MigratePeer2Peer        = 1 << 1
	MigrateChangeProtection = 1 << 8
	MigrateUnsafe           = 1 << 9
	MigrateAbortOnError     = 1 << 12
	MigrateTLS              = 1 << 16
	MigrateKemari           = 1 << 30 // ours: protect
)
